"""Convert a checkpoint of another project that was trained with AttnRes or MoDA to one of this package."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..checkpoints.carried_files import carry_files, check_carried, check_tokenizer
from ..checkpoints.other_forms import check_form_of_folder
from ..checkpoints.weights_check import check_weights
from ..configuration_depthattn import DepthAttnConfig
from ..errors import UserError
from ..errors.messages import one_line
from ..model_card import additions
from ..modeling_depthattn import DepthAttnForCausalLM
from ..utils.text_table import few, size, table
from .depth_shards import weights_dtype
from .foreign_formats import AUTO
from .importers.foreign_checkpoint import (
    ForeignCheckpoint,
    ImportPlan,
    check_weights_are_plain,
    read_foreign_checkpoint,
)
from .importers.registry import importer_for
from .model_card import write_import_card
from .new_tensors import write_new_tensors
from .output_folder import checked_folders, complete_folder


@dataclass(frozen=True)
class ImportReport:
    """The report of `import_checkpoint`.

    Attributes:
        source: folder or Hub id of the checkpoint.
        output_dir: the new checkpoint.
        format: its format.
        model_type: model type of the host.
        num_hidden_layers: number of decoder layers.
        depth: description of AttnRes or MoDA.
        num_read: number of tensors of the source that are in the new checkpoint.
        num_written: number of its tensors.
        mapped: the tensors of the source in each of its tensors, by name; none for a constant.
        dropped: tensors of the source that it does not need, with the reason.
        notes: what the user should know about the result.
        bytes_written: size of the weights.
        tokenizer_code: files of the tokenizer's own code that were copied.
        seconds: duration.
    """

    source: str
    output_dir: str
    format: str
    model_type: str
    num_hidden_layers: int
    depth: str
    num_read: int
    num_written: int
    mapped: dict[str, list[str]]
    dropped: dict[str, str]
    notes: tuple[str, ...]
    bytes_written: int
    tokenizer_code: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        rows = [
            ("source", f"{self.source} ({self.format})"),
            ("output", f"{self.output_dir} ({self.model_type}, {self.num_hidden_layers} layers)"),
            ("depth", self.depth),
            ("tensors", f"{self.num_read} of the source became {self.num_written}"),
            *(("left out", f"{few(names)}: {reason}") for reason, names in reasons.items()),
            *(("note", note) for note in self.notes),
            ("weights", f"{size(self.bytes_written)} written"),
            *([("tokenizer code", ", ".join(self.tokenizer_code))] if self.tokenizer_code else ()),
            ("time", f"{self.seconds:.1f} s"),
        ]
        return table(rows)


def import_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    format: str = AUTO,
    overwrite: bool = False,
    revision: str | None = None,
    require_tokenizer: bool = False,
    copy_tokenizer_code: bool = False,
    progress: bool | None = None,
) -> ImportReport:
    """Convert a checkpoint of another project that was trained with AttnRes or MoDA to one of this package.

    The new checkpoint computes what the code of the project computes, up to rounding. Every tensor and every config
    field of the source is used, or known to have no effect; anything else is an error. `output_dir` is created only
    when the checkpoint is complete, and a few megabytes of the weights are in memory at once.

    Args:
        source: local folder or Hub id of the checkpoint, with config.json and safetensors weights.
        output_dir: the folder to create.
        format: name of the format (`foreign_formats.FORMATS`); `"auto"` recognises it.
        overwrite: replace an existing checkpoint at `output_dir`, once the new one is complete.
        revision: branch, tag or commit of a Hub repository.
        require_tokenizer: raise instead of warning if the source has no tokenizer.
        copy_tokenizer_code: copy the code of a tokenizer with custom code, instead of raising.
        progress: whether to show progress; `None`: a bar on a terminal, a line every few seconds elsewhere.

    Returns:
        The report; `str` formats it as a table.

    Raises:
        UserError: if the format is not known, the checkpoint is damaged or has something that this package cannot
            express, or the output cannot be written.
    """
    started = time.perf_counter()
    folder, hub_id, target = checked_folders(source, output_dir, overwrite=overwrite, revision=revision)
    check_form_of_folder(folder)
    foreign = read_foreign_checkpoint(folder)
    # First, so that a format that cannot be imported at all is not refused for its quantised weights.
    importer = importer_for(foreign, format)
    check_weights_are_plain(foreign)
    code = check_carried(folder, foreign.weights.weight_map.values(), copy_tokenizer_code=copy_tokenizer_code)
    plan = importer.plan(foreign)
    config = _config(foreign, plan)
    notes = (*plan.notes, *([f"config.json names the tokenizer {plan.tokenizer!r}"] if plan.tokenizer else ()))
    check_tokenizer(folder, require_tokenizer, named=plan.tokenizer)
    _check_tensors(foreign, plan, config)

    with complete_folder(target, overwrite) as partial:
        carry_files(folder, partial)
        bytes_written = write_new_tensors(partial, foreign.weights, plan.tensors, progress=progress)
        write_import_card(
            partial,
            config,
            name=target.name,
            hub_id=hub_id,
            source_folder=folder,
            depth_class=DepthAttnForCausalLM.__name__,
            project=importer.PROJECT,
        )
        # Last, since an incomplete folder without config cannot be loaded.
        config.save_pretrained(partial)
    return ImportReport(
        source=str(source),
        output_dir=str(output_dir),
        format=importer.NAME,
        model_type=plan.host.model_type,
        num_hidden_layers=plan.host.num_hidden_layers,
        depth=additions(config),
        num_read=len(foreign.entries) - len(plan.dropped),
        num_written=len(plan.tensors),
        mapped={name: tensor.sources for name, tensor in plan.tensors.items()},
        dropped=dict(plan.dropped),
        notes=notes,
        bytes_written=bytes_written,
        tokenizer_code=tuple(code),
        seconds=time.perf_counter() - started,
    )


def _config(foreign: ForeignCheckpoint, plan: ImportPlan) -> DepthAttnConfig:
    host: PreTrainedConfig = plan.host
    # The output must not contain a local path or refer to code of the source.
    host._name_or_path = ""
    host.architectures = None
    host.dtype = weights_dtype(foreign.entries.values())
    try:
        return DepthAttnConfig(text_config=host, architectures=[DepthAttnForCausalLM.__name__], **plan.options)
    except (StrictDataclassError, ValueError, TypeError) as error:
        # Strict configs raise errors of huggingface_hub; the innermost error names field and value.
        raise UserError(f"{foreign.folder}: {one_line(error)}") from error


def _check_tensors(foreign: ForeignCheckpoint, plan: ImportPlan, config: DepthAttnConfig) -> None:
    """Check that the new tensors are exactly those of the model."""
    entries = {name: tensor.entry for name, tensor in plan.tensors.items()}
    name = f"{foreign.folder}, imported"
    if ignored := check_weights(name, config, DepthAttnForCausalLM, entries):
        raise UserError(f"{name}: has tensors that the model would ignore ({few(ignored)}).")
