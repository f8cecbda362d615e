"""`depthattn eval MODEL --perplexity`: loads the model, scores the texts, prints a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..conversion.checkpoint_files import ConversionError
from ..conversion.paths import user_path
from ..conversion.text_table import table
from .command_arguments import default_run_folder, find_model, is_local, usable_device, written_limit
from .harness.environment import go_offline
from .harness.task_results import fingerprint
from .perplexity_domains import REPORT_FILE, check_output, evaluate_domains, without_documents
from .result_files import json_text
from .text_sources import DATASET_PREFIX, read_domains

_MAX_DEFAULT_WINDOW = 2048


def run_perplexity(args: argparse.Namespace) -> int:
    """Score the texts of `args.perplexity`.

    Args:
        args: of `depthattn eval`.

    Returns:
        The exit code.

    Raises:
        ConversionError: a text is missing or shorter than one window, the model cannot be loaded, or the output is no
            file of this command.
    """
    path = output_file(args)
    check_output(path, overwrite=args.overwrite)
    if is_local(args.model) and not any(DATASET_PREFIX in source for source in args.perplexity):
        go_offline()
    folder = find_model(args.model, args.revision)
    if (limit := written_limit(folder)) is not None:
        _window(args, limit)
    domains = read_domains(args.perplexity)

    from ..conversion.model_loading import check_checkpoint, load_model, load_tokenizer

    device = usable_device(args.device)
    config = check_checkpoint(folder, name=args.model, trust_remote_code=args.trust_remote_code)
    window, stride = _window(args, getattr(config.get_text_config(), "max_position_embeddings", None))
    loading = {"name": args.model, "trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(folder, **loading)
    model = load_model(folder, dtype=args.dtype, device=device, adapter=args.peft, **loading)
    settings = {
        "model": args.model,
        "model_fingerprint": fingerprint(folder),
        "peft": args.peft,
        "peft_fingerprint": fingerprint(user_path(args.peft)) if args.peft else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": _versions(),
    }
    report = evaluate_domains(
        model,
        tokenizer,
        domains,
        window=window,
        stride=stride,
        batch_size=8 if args.batch_size == "auto" else int(args.batch_size),
        settings=settings,
        path=path,
        overwrite=args.overwrite,
        name=args.model,
        progress=args.progress,
    )
    print(json_text(without_documents(report)).rstrip() if args.json else f"{_text(report)}\n\nin {path}")
    return 0


def output_file(args: argparse.Namespace) -> Path:
    """The file of the results: `--out` if it ends in `.json`, else a file in that folder."""
    path = args.out or default_run_folder(args.model, ["perplexity"])
    return path if path.suffix == ".json" else path / REPORT_FILE


def _window(args: argparse.Namespace, limit: int | None) -> tuple[int, int]:
    """Tokens read at once, and the distance of the windows."""
    limit = args.max_length or limit or _MAX_DEFAULT_WINDOW
    window = args.window or args.max_length or min(limit, _MAX_DEFAULT_WINDOW)
    if window > limit:
        raise ConversionError(
            f"--window {window}: more than the context of {limit} tokens; --max-length {window} goes beyond it."
        )
    stride = args.stride or max(1, window // 2)
    if stride > window:
        raise ConversionError(f"--stride {stride}: must be at most the window of {window}.")
    return window, stride


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
    lines = [table(rows), "", f"window {settings['window']}, stride {settings['stride']}, {settings['dtype']}"]
    for name, domain in report["domains"].items():
        if count := domain["num_documents_without_loss"]:
            lines.append(f"{name}: the loss of {count} of {domain['num_documents']} documents is NaN or infinite.")
    return "\n".join(lines)


def _numbers(values: dict[str, float]) -> list[str]:
    return [f"{values[name]:.4f}" for name in ("perplexity", "bits_per_byte", "loss_nats_per_token")]
