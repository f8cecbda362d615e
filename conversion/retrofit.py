"""Turns a stock checkpoint into one with depth attention that computes the same logits.

The weights are linked as files. What is new goes beside them: the depth parameters (one small shard), an index that
names everything, the config, the model code and a model card.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..checkpoints.carried_files import carry_files, check_carried, has_tokenizer
from ..checkpoints.checkpoint_files import (
    TensorEntry,
    WeightFiles,
    read_weight_files,
    shard_name,
    write_index,
    write_shard,
)
from ..checkpoints.config_fields import CONFIG_FIELDS
from ..checkpoints.foreign_tensors import check_stock_tensors
from ..checkpoints.source_folder import find_folder
from ..checkpoints.weights_check import check_weights
from ..configuration_depthattn import DEFAULT_NUM_BLOCKS, DepthAttnConfig
from ..depth_options import DEPTH_KV_FIELDS, DepthConnectionType, DepthGateType, DepthKVType
from ..errors import UserError
from ..model_card import describe_connection, describe_depth_kv
from ..utils.paths import user_path
from ..utils.progress import progress_bar
from ..utils.text_table import few, table, weights_summary
from .depth_shards import depth_values, plan_depth_shards, weights_dtype
from .model_card import write_model_card
from .output_folder import (
    ByteCounts,
    check_apart,
    check_target,
    complete_folder,
    place_weights,
)
from .sources import (
    Architecture,
    architecture_of,
    host_class_of,
    key_prefix_of,
    one_line,
    read_host_config,
)

logger = logging.get_logger(__name__)

# Field -> the value that does not reproduce the host, why, and the one that does.
_INEXACT = {
    "read_scale": ("mean", "its reads are means", "sum"),
    "norm_position": ("post", "its norms stand behind the residual sums", "host"),
}


@dataclass(frozen=True)
class RetrofitReport:
    """What `retrofit` made.

    Attributes:
        source: the folder or Hub id.
        output_dir: the new checkpoint.
        model_type: the host's model type.
        num_hidden_layers: the host's layers.
        architecture: our class.
        connection: the depth connection, in words.
        sublayers_per_block: size of a block; 1 is Full AttnRes.
        num_sources: sources that the output reads: finished blocks (the embedding counts as one) and the open block.
        depth_kv: MoDA, in words; `None` without it.
        num_slots: the most depth slots that a layer reads.
        num_depth_parameters: new parameters, float32 but for the projections of MoDA.
        num_projection_parameters: how many of them are in these projections, in the dtype of the host's weights.
        bytes_linked: weights that are hard links to the source.
        bytes_copied: weights that had to be copied.
        bytes_written: new weights.
        unused_tensors: tensors of the source that its model leaves out (other heads, parts for images).
        tokenizer_code: code of the source's tokenizer that was copied: it runs with `trust_remote_code=True`.
        seconds: duration.
    """

    source: str
    output_dir: str
    model_type: str
    num_hidden_layers: int
    architecture: str
    connection: str
    sublayers_per_block: int
    num_sources: int
    depth_kv: str | None
    num_slots: int
    num_depth_parameters: int
    num_projection_parameters: int
    bytes_linked: int
    bytes_copied: int
    bytes_written: int
    unused_tensors: tuple[str, ...]
    tokenizer_code: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict:
        """The report as a dictionary for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("source", f"{self.source} ({self.model_type}, {self.num_hidden_layers} layers)"),
            ("output", f"{self.output_dir} ({self.architecture})"),
            ("connection", self.connection),
            ("sources", f"{self.num_sources} at the output"),
            *([("depth slots", f"at most {self.num_slots} in a layer: {self.depth_kv}")] if self.depth_kv else ()),
            ("depth parameters", self._depth_parameters()),
            ("weights", weights_summary(self.bytes_linked, self.bytes_copied, self.bytes_written)),
            *([("not used", few(self.unused_tensors))] if self.unused_tensors else ()),
            *([("tokenizer code", ", ".join(self.tokenizer_code))] if self.tokenizer_code else ()),
            ("time", f"{self.seconds:.1f} s"),
        ]
        return table(rows)

    def _depth_parameters(self) -> str:
        in_projections = self.num_projection_parameters
        summary = f"{self.num_depth_parameters - in_projections:,}, float32"
        return summary + (f", and {in_projections:,} in projections" if in_projections else "")


def retrofit(
    source: str | Path,
    output_dir: str | Path,
    *,
    connection: str = "attn_res",
    num_blocks: int | None = None,
    sublayers_per_block: int | None = None,
    read_scale: str = "sum",
    depth_kv: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    copy: bool = False,
    require_tokenizer: bool = False,
    copy_tokenizer_code: bool = False,
    ignore_model_code: bool = False,
    progress: bool | None = None,
    **config_fields,
) -> RetrofitReport:
    """Give a stock checkpoint depth attention without changing a logit.

    The output appears under its name when it is complete. Its weights share their disk space with the source as hard
    links where the file system allows that: a program that overwrites one of these files in place (saving with
    transformers does not) changes both. Memory stays far below 1 GB for a checkpoint of any size.

    Args:
        source: a local folder, or a Hub id; safetensors weights of a supported host, not quantised.
        output_dir: the new checkpoint.
        connection: `"attn_res"`, or `"residual"` for the host's own sums: MoDA alone with `depth_kv`, without it the
            unchanged control behind the same classes.
        num_blocks: at most this many blocks; 8 when neither this nor `sublayers_per_block` is given.
        sublayers_per_block: sublayers (two per layer) in a block; 1 is Full AttnRes. Not together with `num_blocks`.
        read_scale: only `"sum"` reproduces the host.
        depth_kv: MoDA: `"attention"` or `"attention+mlp"`, with `depth_gate="head"` (also when that is not given),
            which alone reproduces the host; its projections are drawn from a fixed seed.
        overwrite: replace an existing checkpoint at `output_dir`, once the new one is complete.
        revision: branch, tag or commit of a Hub repository.
        copy: copy the weights instead of linking them.
        require_tokenizer: raise when the source has no tokenizer, instead of warning.
        copy_tokenizer_code: copy the code of a tokenizer that brings its own, instead of raising: whoever loads the
            output with `trust_remote_code=True` runs it.
        ignore_model_code: take transformers' class for a source that brings its own model code, instead of raising.
        progress: as in `progress_bar`: `None` shows a bar on a terminal and a line every few seconds elsewhere.
        **config_fields: other fields of `DepthAttnConfig`, e.g. `query="input"` or `num_depth_slots=8`.

    Returns:
        What was made, printable.

    Raises:
        UserError: the source cannot be retrofitted, or the output not written; the message is one line.
    """
    started = time.perf_counter()
    target = user_path(output_dir).resolve()
    check_target(target, overwrite)
    folder, hub_id = find_folder(source, revision)
    check_apart(target, folder)
    host = read_host_config(folder, ignore_model_code=ignore_model_code)
    weights = read_weight_files(folder)
    entries = dict(weights.entries())
    check_stock_tensors(folder, entries)
    code = check_carried(folder, weights.weight_map.values(), copy_tokenizer_code=copy_tokenizer_code)
    key_prefix = key_prefix_of(folder, weights, host.num_hidden_layers)
    architecture = architecture_of(folder, host, key_prefix)
    fields = {"num_blocks": num_blocks, "sublayers_per_block": sublayers_per_block, "read_scale": read_scale}
    fields |= {"connection": connection, "depth_kv": depth_kv, **config_fields}
    config = retrofit_config(host, architecture, **fields)
    if not has_tokenizer(folder):
        problem = f"{folder}: no tokenizer in it"
        if require_tokenizer:
            raise UserError(f"{problem}; add its files, or go on without (--allow-missing-tokenizer).")
        logger.warning(f"{problem}; the output has none either.")
    host_class = host_class_of(folder, host, architecture)
    unused = check_weights(str(folder), host, host_class, entries)

    is_attn_res = config.connection == DepthConnectionType.ATTN_RES
    counts = ByteCounts()
    with complete_folder(target, overwrite) as partial:
        carry_files(folder, partial)
        num_parameters = _write_weights(partial, config, weights, key_prefix, counts, copy=copy, progress=progress)
        write_model_card(
            partial,
            config,
            name=target.name,
            hub_id=hub_id,
            source_folder=folder,
            depth_class=architecture.depth_class,
            num_depth_parameters=sum(num_parameters.values()),
        )
        # Last, with the model code: without it, nothing here can be loaded.
        config.save_pretrained(partial)
    return RetrofitReport(
        source=str(source),
        output_dir=str(output_dir),
        model_type=host.model_type,
        num_hidden_layers=host.num_hidden_layers,
        architecture=architecture.depth_class,
        connection=describe_connection(config),
        sublayers_per_block=config.block_size_sublayers,
        num_sources=config.num_sources(config.num_sublayers) if is_attn_res else 1,
        depth_kv=describe_depth_kv(config),
        num_slots=max(config.depth_slot_plan.num_read),
        num_depth_parameters=sum(num_parameters.values()),
        num_projection_parameters=num_parameters["mlp_depth_kv"],
        bytes_linked=counts.linked,
        bytes_copied=counts.copied,
        bytes_written=counts.written,
        unused_tensors=tuple(unused),
        tokenizer_code=tuple(code),
        seconds=time.perf_counter() - started,
    )


def retrofit_config(host: PreTrainedConfig, architecture: Architecture, **fields) -> DepthAttnConfig:
    """The config of a retrofitted checkpoint.

    Args:
        host: the host's config.
        architecture: the kind of head.
        **fields: fields of `DepthAttnConfig`.

    Raises:
        UserError: an unknown field, a bad value, or one that does not reproduce the host.
    """
    unknown = sorted(set(fields) - set(CONFIG_FIELDS))
    if unknown:
        raise UserError(f"{unknown[0]}: not a field of retrofit; known are {', '.join(CONFIG_FIELDS)}.")
    for name, (value, reason, exact) in _INEXACT.items():
        if fields.get(name) == value:
            raise UserError(f"{name}: {value!r} does not reproduce the host ({reason}); only {exact!r} does.")
    _settle_gate(fields)
    if fields.get("depth_window") is not None:
        raise UserError(
            "depth_window: does not reproduce the host, whose residual sum holds every source; leave it out."
        )
    is_attn_res = fields.get("connection") == DepthConnectionType.ATTN_RES
    if fields.get("connection") == DepthConnectionType.RESIDUAL:
        # Without effect there; the config would say so at every start.
        fields.pop("read_scale", None)
    if is_attn_res and fields.get("num_blocks") is None and fields.get("sublayers_per_block") is None:
        # Written down, so that the checkpoint does not depend on a default.
        fields["num_blocks"] = min(DEFAULT_NUM_BLOCKS, 2 * host.num_hidden_layers)
    try:
        config = DepthAttnConfig(text_config=host, architectures=[architecture.depth_class], **fields)
    except Exception as error:
        # Strict configs raise errors of their own (huggingface_hub); the innermost one names field and value.
        raise UserError(one_line(error)) from error
    return config


def _settle_gate(fields: dict) -> None:
    """MoDA reproduces the host behind a gate only: that is the default here, and nothing else is allowed."""
    if fields.get("depth_kv") is None:
        defaults = DepthAttnConfig.__dataclass_fields__
        for name in DEPTH_KV_FIELDS:
            if fields.get(name) not in (None, defaults[name].default):
                known = " or ".join(repr(str(kind)) for kind in DepthKVType)
                raise UserError(f"{name}: {fields[name]!r} has no effect without depth_kv ({known}).")
        return
    gate = fields.setdefault("depth_gate", str(DepthGateType.HEAD))
    if gate in (None, "none"):
        raise UserError(
            f"depth_gate: {gate!r} does not reproduce the host (its softmax reads the depth slots from the start); "
            f"only {str(DepthGateType.HEAD)!r} does."
        )


def _write_weights(
    folder: Path,
    config: DepthAttnConfig,
    weights: WeightFiles,
    key_prefix: str,
    counts: ByteCounts,
    *,
    copy: bool,
    progress: bool | None,
) -> Counter[str]:
    """Place the host's shards, write the depth shards and the index; returns the number of parameters by leaf name."""
    host_entries = [entry for _, entry in weights.entries()]
    depth_shards = plan_depth_shards(config, key_prefix, weights_dtype(host_entries))
    total = len(weights.shards) + len(depth_shards)
    # transformers prefers a file called model.safetensors to an index, so even a single host shard gets a number.
    new_name = {shard.path.name: shard_name(i, total) for i, shard in enumerate(weights.shards, start=1)}
    with progress_bar(weights.num_bytes, "weights", progress, unit="B") as bar:
        for shard in weights.shards:
            place_weights(shard.path, folder / new_name[shard.path.name], counts, copy=copy, on_bytes=bar.update)
    weight_map = {tensor: new_name[name] for tensor, name in weights.weight_map.items()}
    depth_entries = []
    num_parameters: Counter[str] = Counter()
    for number, modules in enumerate(depth_shards, start=len(weights.shards) + 1):
        name = shard_name(number, total)
        tensors = {tensor: layout for module in modules for tensor, layout in module.tensors.items()}
        counts.written += write_shard(folder / name, tensors, depth_values(config, modules))
        weight_map |= dict.fromkeys(tensors, name)
        depth_entries += [TensorEntry(dtype, shape, 0, num_bytes) for dtype, shape, num_bytes in tensors.values()]
        for module in modules:
            num_parameters[module.leaf] += module.num_parameters
    write_index(folder, weight_map, [*host_entries, *depth_entries])
    return num_parameters
