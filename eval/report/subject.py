"""A model of a report before it is loaded: checkpoint, tokenized text and settings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

import hf_depthattn

from ...checkpoints.adapter_files import adapter_folder
from ...checkpoints.adapter_loading import merge_adapter
from ...checkpoints.model_loading import check_checkpoint, check_token_ids, load_model, load_tokenizer
from ...checkpoints.source_folder import find_folder
from ...depth_options import DEPTH_OPTIONS, DepthConnectionType
from ...errors import UserError
from ...errors.messages import one_line
from ...utils.paths import user_path
from ..metrics.probing.probe import DepthProbe
from ..metrics.probing.text import TextBatches
from ..model_folder import fingerprint
from .options import NUM_SEQUENCES, SEQUENCE_LENGTH, ReportOptions
from .result import MeasureSettings, ModelInfo


@dataclass(frozen=True)
class Subject:
    """A model of a report, before it is loaded.

    Attributes:
        source: folder or Hub id as given by the user.
        name: short name, unique in the report.
        folder: folder of the checkpoint.
        adapter: folder of a PEFT adapter as given by the user, if any.
        text: the text as windows of tokens.
        settings: settings that determine the numbers.
    """

    source: str
    name: str
    folder: Path
    adapter: str | None
    text: TextBatches
    settings: MeasureSettings


def prepare(
    source: str, name: str, options: ReportOptions, revision: str | None = None, adapter: str | None = None
) -> Subject:
    """Find a checkpoint and tokenize the text.

    Args:
        source: folder or Hub id of the checkpoint.
        name: short name, unique in the report.
        options: how to read the text.
        revision: branch, tag or commit of a Hub repository.
        adapter: folder of a PEFT adapter for it.

    Raises:
        UserError: if there is no checkpoint or tokenizer, or the text is too short.
    """
    folder, hub_id = find_folder(source, revision)
    config = check_checkpoint(folder, name=source, trust_remote_code=options.trust_remote_code)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = options.sequence_length or min(SEQUENCE_LENGTH, limit or SEQUENCE_LENGTH)
    if limit is not None and length > limit:
        raise UserError(f"--sequence-length {length}: exceeds the context length of {name}, {limit} tokens.")
    text = _windows(folder, options, length)
    settings = MeasureSettings(
        fingerprint=fingerprint(folder),
        revision=revision,
        peft_fingerprint=fingerprint(adapter_folder(adapter)) if adapter else None,
        text_sha256=hashlib.sha256(options.text.encode()).hexdigest(),
        tokens_sha256=text.sha256,
        num_sequences=text.num_sequences,
        sequence_length=text.sequence_length,
        batch_size=text.batch_size,
        dtype=options.dtype,
        device=options.device,
        versions=versions(),
    )
    return Subject(hub_id or str(source), name, folder, adapter, text, settings)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that determine the numbers."""
    return {
        "hf_depthattn": hf_depthattn.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def short_names(sources: Sequence[str]) -> list[str]:
    """Return the shortest unique trailing parts of paths or Hub ids."""
    # Resolve folders, so that `.` has a name; keep Hub ids.
    paths = [user_path(source) for source in sources]
    parts = [(path.resolve() if path.is_dir() else path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*part[-length:])) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, start=1)]


def load_probe(subject: Subject, options: ReportOptions) -> DepthProbe:
    """Load the model of a subject.

    Raises:
        UserError: if it cannot be loaded, is incomplete, or has no decoder layers.
    """
    model = load_model(
        subject.folder,
        name=subject.source,
        dtype=getattr(torch, options.dtype),
        device=options.device,
        adapter=subject.adapter,
        trust_remote_code=options.trust_remote_code,
    )
    if subject.adapter is not None:
        # Metrics modify the original layers, so the adapter must be merged.
        model = merge_adapter(model, subject.adapter)
    try:
        probe = DepthProbe(model)
    except ValueError as error:
        raise UserError(f"{subject.source}: {one_line(error)}") from error
    check_token_ids(subject.text.ids, model, subject.source)
    return probe


def describe(probe: DepthProbe) -> ModelInfo:
    """Return size and kind of a model."""
    model: PreTrainedModel = probe.model
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_attention_heads", None)
    own = {}
    if probe.has_depth_sites:
        connection = probe.depth_config.connection
        of_connection = [name for name, option in DEPTH_OPTIONS.items() if connection in option.connections]
        if connection == DepthConnectionType.ATTN_RES:
            of_connection = ["block_size_sublayers", "read_scale"]
        fields = ["connection", *of_connection, "depth_kv", "depth_gate"]
        if getattr(model.config, "value_residual", False):
            fields.append("value_residual")
        own = {name: value for name in fields if (value := getattr(model.config, name, None)) is not None}
    return ModelInfo(
        class_name=type(model).__name__,
        family=probe.family,
        num_layers=probe.num_layers,
        hidden_size=getattr(config, "hidden_size", None),
        num_attention_heads=num_heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        num_parameters=sum(p.numel() for p in model.parameters()),
        non_finite_parameters=[
            name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()
        ],
        depth_attention=own,
    )


def _windows(folder: Path, options: ReportOptions, length: int) -> TextBatches:
    tokenizer = load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    try:
        text = TextBatches.from_text(
            tokenizer,
            options.text,
            sequence_length=length,
            num_sequences=options.num_sequences,
            batch_size=options.batch_size,
        )
    except ValueError as error:
        raise UserError(f"{options.text_name}: {one_line(error)}.") from error
    if text.num_sequences < 2:
        raise UserError(
            f"{options.text_name}: one window of {length} tokens; a report fits on one half of the windows and scores "
            "on the other, so it needs two. Give a longer --text, or a smaller --sequence-length."
        )
    if options.num_sequences is None and text.num_sequences > NUM_SEQUENCES:
        kept = [i * text.num_sequences // NUM_SEQUENCES for i in range(NUM_SEQUENCES)]
        text = TextBatches(text.ids[kept], text.batch_size)
    return text
