"""Measure the perplexity of a checkpoint on several texts and write the results to a JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.adapter_files import adapter_folder
from ..checkpoints.source_folder import find_checkpoint
from ..errors import UserError
from ..utils.argument_checks import AUTO, DTYPES, check_at_least, check_batch_size, check_dtype
from ..utils.paths import user_path
from .model_folder import default_run_folder, fingerprint, is_local, usable_device, written_limit
from .offline import go_offline
from .perplexity_results import REPORT_FILE, DomainPerplexity, PerplexityFile, PerplexityReport
from .text_sources import DATASET_PREFIX, read_domains

#: Default.
BATCH_SIZE = 8
_MAX_DEFAULT_WINDOW = 2048


@dataclass(frozen=True, slots=True)
class PerplexityOptions:
    """Options of `run_perplexity`.

    Attributes:
        model: folder or Hub id of a checkpoint.
        sources: texts, as accepted by `text_sources.read_domains`.
        window: tokens per window; by default the model's context length, at most 2048.
        stride: distance between window starts; half a window by default.
        max_length: context length of the model; by default `max_position_embeddings` of its config.
        peft: folder of a PEFT adapter for the model.
        dtype: dtype of the weights; `"auto"` uses that of the checkpoint.
        device: device of the model; by default a GPU if one is available.
        batch_size: windows per forward pass; `"auto"` is `BATCH_SIZE`.
        revision: branch, tag or commit of a Hub repository.
        trust_remote_code: allow code that is part of the checkpoint.
        out: result file (if it ends in `.json`) or its folder; by default a folder in `eval_results`.
        overwrite: discard an existing run in the file instead of resuming it.
        progress: as in `utils.progress.progress_bar`.
    """

    model: str
    sources: tuple[str, ...]
    window: int | None = None
    stride: int | None = None
    max_length: int | None = None
    peft: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_size: int | str = BATCH_SIZE
    revision: str | None = None
    trust_remote_code: bool = False
    out: Path | None = None
    overwrite: bool = False
    progress: bool | None = None

    def check(self) -> None:
        """Check the values, without torch.

        Raises:
            UserError: if one is invalid.
        """
        check_at_least({name: getattr(self, name) for name in ("window", "stride", "max_length")}, 1)
        check_batch_size(self.batch_size)
        check_dtype(self.dtype, (AUTO, *DTYPES))
        if self.peft is not None:
            adapter_folder(self.peft)

    @property
    def windows_per_pass(self) -> int:
        """The batch size as a number: unlike lm-eval, `"auto"` does not try what fits into the memory."""
        return BATCH_SIZE if isinstance(self.batch_size, str) else self.batch_size

    @property
    def file(self) -> Path:
        """Path of the result file."""
        path = self.out or default_run_folder(self.model, ["perplexity"])
        return path if path.suffix == ".json" else path / REPORT_FILE

    def window_and_stride(self, limit: int | None) -> tuple[int, int]:
        """Return the window and the stride in tokens.

        Args:
            limit: context length of the model, or None if it is unlimited.

        Raises:
            UserError: if the window exceeds the context length, or the stride exceeds the window.
        """
        limit = self.max_length or limit or _MAX_DEFAULT_WINDOW
        window = self.window or self.max_length or min(limit, _MAX_DEFAULT_WINDOW)
        if window > limit:
            raise UserError(
                f"--window {window}: exceeds the context length of {limit}; add --max-length {window} to allow it."
            )
        stride = self.stride or max(1, window // 2)
        if stride > window:
            raise UserError(f"--stride {stride}: must be at most the window of {window}.")
        return window, stride


class PerplexityRun(NamedTuple):
    """Result of `run_perplexity`.

    Attributes:
        file: path of the result file.
        report: its content.
    """

    file: Path
    report: PerplexityReport


def run_perplexity(options: PerplexityOptions) -> PerplexityRun:
    """Score the texts whose results are not yet in the result file.

    Args:
        options: model, texts and result file.

    Raises:
        UserError: if a text is missing or shorter than one window, the model cannot be loaded, or the output is not a
            result file of this function.
    """
    options.check()
    file = PerplexityFile(options.file, overwrite=options.overwrite)
    if is_local(options.model) and not any(DATASET_PREFIX in source for source in options.sources):
        go_offline()
    folder = find_checkpoint(options.model, options.revision)
    if (limit := written_limit(folder)) is not None:
        options.window_and_stride(limit)
    domains = read_domains(options.sources)

    # Imported late because they import torch: the checks above report mistakes without that delay.
    from ..checkpoints.model_loading import check_checkpoint, load_model, load_tokenizer
    from .perplexity_domains import evaluate_domains

    device = usable_device(options.device)
    trust_remote_code = options.trust_remote_code
    config = check_checkpoint(folder, name=options.model, trust_remote_code=trust_remote_code)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    window, stride = options.window_and_stride(limit)
    tokenizer = load_tokenizer(folder, name=options.model, trust_remote_code=trust_remote_code)
    model = load_model(
        folder,
        dtype=options.dtype,
        device=device,
        adapter=options.peft,
        name=options.model,
        trust_remote_code=trust_remote_code,
    )
    settings = {
        **_deciding_settings(options, folder),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": _versions(),
        "window": window,
        "stride": stride,
    }
    results = file.known_domains(settings, domains)

    def report() -> PerplexityReport:
        return PerplexityReport(settings, {name: results[name] for name in domains if name in results})

    def store(name: str, result: DomainPerplexity) -> None:
        results[name] = result
        file.store(report())

    evaluate_domains(
        model,
        tokenizer,
        {name: documents for name, documents in domains.items() if name not in results},
        window=window,
        stride=stride,
        batch_size=options.windows_per_pass,
        name=options.model,
        on_domain=store,
        progress=options.progress,
    )
    return PerplexityRun(options.file, report())


def _deciding_settings(options: PerplexityOptions, folder: Path) -> dict[str, Any]:
    """Return the settings that determine the numbers and are known before the model, as JSON values."""
    return {
        "model": options.model,
        "model_fingerprint": fingerprint(folder),
        "peft": options.peft,
        "peft_fingerprint": fingerprint(user_path(options.peft)) if options.peft else None,
    }


def _versions() -> dict[str, str]:
    import hf_depthattn

    return {"hf_depthattn": hf_depthattn.__version__, **{name: version(name) for name in ("transformers", "torch")}}
