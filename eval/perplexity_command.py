"""`depthattn eval MODEL --perplexity`: loads the model, scores the texts, prints a table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_depthattn.conversion.checkpoint_files import ConversionError
from hf_depthattn.conversion.text_table import table
from hf_depthattn.eval.perplexity_domains import evaluate_domains, read_domains

_MAX_DEFAULT_WINDOW = 2048


def run_perplexity(args: argparse.Namespace, folder: Path, device: str) -> int:
    """Score the texts of `args.perplexity`.

    Args:
        args: of `depthattn eval`.
        folder: the checkpoint.
        device: where the model runs.

    Returns:
        The exit code.

    Raises:
        ConversionError: a text is missing or shorter than one window, or the model cannot be loaded.
    """
    from hf_depthattn.conversion.model_loading import check_checkpoint, load_model, load_tokenizer
    from hf_depthattn.eval.lm_eval_run import go_offline
    from hf_depthattn.eval.lm_eval_run_folder import default_run_folder, fingerprint

    if Path(args.model).expanduser().is_dir() and not any("hf:" in source for source in args.perplexity):
        go_offline()
    domains = read_domains(args.perplexity)
    check_checkpoint(folder, name=args.model, trust_remote_code=args.trust_remote_code)
    loading = {"name": args.model, "trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(folder, **loading)
    model = load_model(folder, dtype=args.dtype, device=device, adapter=args.peft, **loading)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _MAX_DEFAULT_WINDOW
    limit = args.max_length or limit
    window = args.window or args.max_length or min(limit, _MAX_DEFAULT_WINDOW)
    if window > limit:
        raise ConversionError(
            f"--window {window}: more than the context of {limit} tokens; --max-length {window} goes beyond it."
        )
    stride = args.stride or max(1, window // 2)
    if stride > window:
        raise ConversionError(f"--stride {stride}: must be at most the window of {window}.")
    path = args.out or default_run_folder(args.model, ["perplexity"])
    path = path if path.suffix == ".json" else path / "perplexity.json"
    if args.overwrite:
        path.unlink(missing_ok=True)
    report = evaluate_domains(
        model,
        tokenizer,
        domains,
        window=window,
        stride=stride,
        batch_size=8 if args.batch_size == "auto" else int(args.batch_size),
        settings={
            "model": args.model,
            "model_fingerprint": fingerprint(folder),
            "peft": args.peft,
            "peft_fingerprint": fingerprint(Path(args.peft)) if args.peft else None,
            "dtype": str(model.dtype).removeprefix("torch."),
            "versions": _versions(),
        },
        path=path,
    )
    print(json.dumps(report, indent=2) if args.json else f"{_text(report)}\n\nin {path}")
    return 0


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import hf_depthattn

    return {"hf_depthattn": hf_depthattn.__version__, **{name: version(name) for name in ("transformers", "torch")}}


def _text(report: dict[str, Any]) -> str:
    rows = [["domain", "perplexity", "bits/byte", "nats/token", "tokens", "bytes", "documents"]]
    for name, domain in report["domains"].items():
        counts = [str(domain[count]) for count in ("num_tokens", "num_bytes", "num_documents")]
        rows.append([name, *_numbers(domain), *counts])
    rows.append(["mean of the domains", *_numbers(report["mean"]), "", "", ""])
    settings = report["settings"]
    return f"{table(rows)}\n\nwindow {settings['window']}, stride {settings['stride']}, {settings['dtype']}"


def _numbers(values: dict[str, float]) -> list[str]:
    return [f"{values[name]:.4f}" for name in ("perplexity", "bits_per_byte", "loss_nats_per_token")]
