"""Convert a checkpoint back to the class of its host, while its depth parameters have no effect."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..attn_res_reads import DEPTH_READS
from ..checkpoints.carried_files import carry_files, check_carried
from ..checkpoints.checkpoint_files import WeightFiles
from ..checkpoints.old_sites import site_name
from ..checkpoints.weights_check import check_weights
from ..configuration_depthattn import DepthAttnConfig
from ..depth_connections import connection_class
from ..depth_options import DEPTH_OPTIONS
from ..errors import UserError
from ..utils.text_table import table, weights_summary
from .architecture import LABEL_FIELDS, Architecture, host_class_of
from .depth_shards import (
    DEPTH_KEY,
    DEPTH_LEAVES,
    check_depth_tensors,
    initial_values,
    plan_depth_shards,
    usual_name,
)
from .kept_weights import write_kept_weights
from .output_folder import ByteCounts, checked_folders, complete_folder
from .source import DepthSource, read_depth_source

# Parameters that may have any value: they have no effect while the others have their initial values.
_FREE_PARAMETER = re.compile(r"\.key_norm(?:\.weight)?$|\.mlp_depth_kv\.")

_NUM_MODULES_NAMED = 4


@dataclass(frozen=True)
class RestoreReport:
    """The report of `restore`.

    Attributes:
        source: folder or Hub id of the depth attention checkpoint.
        output_dir: the stock checkpoint.
        architecture: its class in transformers.
        num_depth_tensors: number of tensors that were removed.
        bytes_linked: size of the weights that are hard links to the source.
        bytes_copied: size of the weights that were copied.
        bytes_written: size of the shards that were rewritten without their depth tensors.
        tokenizer_code: files of the tokenizer's own code that were copied.
        seconds: duration.
    """

    source: str
    output_dir: str
    architecture: str
    num_depth_tensors: int
    bytes_linked: int
    bytes_copied: int
    bytes_written: int
    tokenizer_code: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("source", self.source),
            ("output", f"{self.output_dir} ({self.architecture})"),
            ("removed", f"{self.num_depth_tensors} depth tensors"),
            ("weights", weights_summary(self.bytes_linked, self.bytes_copied, self.bytes_written)),
            *([("tokenizer code", ", ".join(self.tokenizer_code))] if self.tokenizer_code else ()),
            ("time", f"{self.seconds:.1f} s"),
        ]
        return table(rows)


def restore(
    source: str | Path,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    copy: bool = False,
    copy_tokenizer_code: bool = False,
    progress: bool | None = None,
) -> RestoreReport:
    """Remove the depth parameters of a checkpoint while they have their initial values, and therefore no effect.

    Key-norm weights and MoDA's projections may have any values. Other weights are kept as they are, trained or not.

    Args:
        source: folder or Hub id of the depth attention checkpoint.
        output_dir: the folder to create.
        overwrite: replace an existing checkpoint at `output_dir`, once the new one is complete.
        revision: branch, tag or commit of a Hub repository.
        copy: copy the weights instead of hard-linking them.
        copy_tokenizer_code: copy the code of a tokenizer with custom code, instead of raising.
        progress: whether to show progress; `None`: a bar on a terminal, a line every few seconds elsewhere.

    Returns:
        The report; `str` formats it as a table.

    Raises:
        UserError: if a depth parameter has been trained (the message names the modules), the checkpoint is incomplete
            or not one of this package, or the output cannot be written.
    """
    started = time.perf_counter()
    folder, _, target = checked_folders(source, output_dir, overwrite=overwrite, revision=revision)
    depth = read_depth_source(folder)
    code = check_carried(folder, depth.weights.weight_map.values(), copy_tokenizer_code=copy_tokenizer_code)
    _check_is_host(folder, depth.config)
    depth_names = check_depth_tensors(folder, depth.config, depth.key_prefix, depth.entries)
    _check_unmoved(depth, depth_names)
    host_class = _host_class(depth)
    host = _host_config(depth.config, depth.architecture, host_class.__name__)
    host_entries = {name: entry for name, entry in depth.entries.items() if name not in depth_names}
    check_weights(str(folder), host, host_class, host_entries)

    counts = ByteCounts()
    with complete_folder(target, overwrite) as partial:
        carry_files(folder, partial)
        write_kept_weights(partial, depth.weights, depth_names, counts, copy=copy, progress=progress)
        # Last, since an incomplete folder without config cannot be loaded.
        host.save_pretrained(partial)
    return RestoreReport(
        source=str(source),
        output_dir=str(output_dir),
        architecture=host_class.__name__,
        num_depth_tensors=len(depth_names),
        bytes_linked=counts.linked,
        bytes_copied=counts.copied,
        bytes_written=counts.written,
        tokenizer_code=tuple(code),
        seconds=time.perf_counter() - started,
    )


def _check_is_host(folder: Path, config: DepthAttnConfig) -> None:
    """Check that the config reproduces the host if its depth parameters have their initial values."""
    connection = connection_class(config)
    if not connection.starts_as_host:
        raise UserError(
            f"{folder}: cannot be restored: connection is {str(config.connection)!r}, which computes another function "
            f"than the host ({connection.inexact_reason})."
        )
    for name, option in DEPTH_OPTIONS.items():
        is_idle = name == "value_residual_init" and not config.value_residual
        if option.exact is ... or is_idle or not option.has_effect(config.connection, config.depth_kv):
            continue
        value = getattr(config, name)
        if value != option.exact:
            shown = value if value is None else repr(str(value))
            raise UserError(
                f"{folder}: cannot be restored: {name} is {shown}, so it computes another function than its host "
                f"({option.inexact_reason})."
            )


def _check_unmoved(depth: DepthSource, depth_names: set[str]) -> None:
    """Check that depth parameters have the values with which they have no effect: their initial ones."""
    expected = {
        name: value
        for shard in plan_depth_shards(depth.config, depth.key_prefix)
        for module in shard
        if module.leaf != "mlp_depth_kv"
        for name, value in initial_values(depth.config, module).items()
    }
    num_layers = depth.config.text_config.num_hidden_layers
    modules: set[str] = set()
    moved: set[str] = set()
    for name, value in _values(depth.weights, {name for name in depth_names if not _FREE_PARAMETER.search(name)}):
        # In the old layout, queries are in sites.
        is_moved = value.ne(expected.get(usual_name(name), torch.zeros(1)))
        module = _module_of(name)
        if module == DEPTH_READS:
            sites = [site_name(site, num_layers) for site in range(len(is_moved))]
            modules.update(sites)
            moved.update(compress(sites, is_moved.any(dim=1).tolist()))
        else:
            modules.add(module)
            moved.update([module] if is_moved.any() else [])
    if moved:
        named = sorted(moved, key=_module_order)
        first = ", ".join(named[:_NUM_MODULES_NAMED]) + (", ..." if len(named) > _NUM_MODULES_NAMED else "")
        raise UserError(
            f"{depth.folder}: {len(moved)} of {len(modules)} depth modules have been trained ({first}); "
            "removing them would change the model."
        )


def _values(weights: WeightFiles, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with these names, one in memory at a time."""
    for shard in weights.shards:
        in_shard = sorted(names & set(shard.tensors))
        if in_shard:
            with safe_open(shard.path, framework="pt") as file:
                yield from ((name, file.get_tensor(name)) for name in in_shard)


def _module_of(name: str) -> str:
    """Return the module of a tensor: `model.layers.3.mlp_depth.mix_scores` -> `layers.3.mlp_depth`."""
    match = DEPTH_KEY.search(name)
    assert match, name
    return match[1]


def _module_order(module: str) -> tuple[int, int]:
    _, layer, leaf = module.split(".")
    return int(layer), DEPTH_LEAVES.index(leaf)


def _host_class(depth: DepthSource) -> type[PreTrainedModel]:
    """Return transformers' class with this head, after checking that it has the checkpoint's key prefix."""
    host_class = host_class_of(depth.folder, depth.config.host_config, depth.architecture)
    expected = host_class.base_model_prefix
    if depth.key_prefix and f"{expected}." != depth.key_prefix:
        raise UserError(
            f"{depth.folder}: its keys start with {depth.key_prefix!r}, but transformers' {host_class.__name__} needs "
            f"'{expected}.'."
        )
    return host_class


def _host_config(config: DepthAttnConfig, row: Architecture, architecture: str) -> PreTrainedConfig:
    host = config.host_config
    host.architectures = [architecture]
    host.dtype = config.dtype
    if row.suffix.endswith("Classification"):
        for name in LABEL_FIELDS:
            setattr(host, name, getattr(config, name))
    return host
