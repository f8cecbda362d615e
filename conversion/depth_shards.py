"""The shards with the depth parameters of a retrofitted checkpoint: their layout and their initial values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import initialization as init

from ..attn_res_reads import DEPTH_READS, DepthReads, has_depth_reads
from ..checkpoint_keys import stacked_name
from ..checkpoints.checkpoint_files import CHUNK_BYTES, TensorEntry
from ..checkpoints.foreign_tensors import check_stock_tensors
from ..checkpoints.old_sites import in_old_layout
from ..configuration_depthattn import DepthAttnConfig
from ..connection_base import DepthSite
from ..depth_connections import DEPTH_MODULES, depth_site
from ..errors import UserError
from ..moda_slots import DEPTH_KV_MODULES, DepthGate, MLPDepthKV, depth_kv_modules
from ..utils.text_table import few
from ..value_residual import VALUE_RESIDUAL, ValueResidual, value_residual_module

#: Names of our modules in a decoder layer, and a regular expression for the tensors of all our modules in checkpoints.
DEPTH_LEAVES = (*DEPTH_MODULES, *DEPTH_KV_MODULES, VALUE_RESIDUAL)
DEPTH_KEY = re.compile(rf"(?:^|\.)((?:layers|h)\.\d+\.(?:{'|'.join(DEPTH_LEAVES)})|{DEPTH_READS})\.")

#: Maximum size of a shard, the default of transformers.
MAX_SHARD_BYTES = 5 * 10**9

#: MoDA's projections of layer i are initialised with the seed `PROJECTION_SEED + i`: retrofits are reproducible.
PROJECTION_SEED = 0

#: The dtypes of weights by their names in safetensors.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class DepthModuleTensors:
    """The tensors of one depth module.

    Attributes:
        layer: index of its decoder layer; `None` for a module of the base model.
        leaf: its name in the layer or the base model.
        tensors: name -> (dtype, shape, size in bytes), in the order of the module.
        num_parameters: number of parameters.
    """

    layer: int | None
    leaf: str
    tensors: dict[str, tuple[str, tuple[int, ...], int]]
    num_parameters: int


def usual_name(name: str) -> str:
    """Return a tensor's name with `model.layers.` instead of `transformer.h.`, which checkpoints of EXAONE have.

    transformers loads both names and saves the second.
    """
    return re.sub(r"^transformer\.h\.", "model.layers.", name)


def weights_dtype(entries: Iterable[TensorEntry]) -> torch.dtype:
    """Return the dtype with the most bytes in a checkpoint; float32 if it has no floating-point weights.

    Args:
        entries: its tensors.
    """
    num_bytes = dict.fromkeys(DTYPES, 0)
    for entry in entries:
        if entry.dtype in num_bytes:
            num_bytes[entry.dtype] += entry.end - entry.start
    return DTYPES[max(num_bytes, key=num_bytes.__getitem__)]


def plan_depth_shards(
    config: DepthAttnConfig, key_prefix: str, dtype: torch.dtype = torch.float32
) -> list[list[DepthModuleTensors]]:
    """Return the depth tensors of a checkpoint in shards of at most `MAX_SHARD_BYTES`; modules are not split.

    Args:
        config: the checkpoint's config.
        key_prefix: the part of its keys before `layers.N.`.
        dtype: dtype of MoDA's projections, that of the host's weights; all other depth tensors are float32.
    """
    shards: list[list[DepthModuleTensors]] = []
    shard_bytes = 0
    for layer in (None, *range(config.text_config.num_hidden_layers)):
        parent = key_prefix if layer is None else f"{key_prefix}layers.{layer}."
        for leaf, module in _depth_modules(config, layer).items():
            parameters = {
                name: value.to(dtype) if isinstance(module, MLPDepthKV) else value
                for name, value in module.state_dict().items()
            }
            if not parameters:
                continue
            tensors = {
                f"{parent}{leaf}.{name}": (_DTYPE_NAMES[value.dtype], tuple(value.shape), value.nbytes)
                for name, value in parameters.items()
            }
            module_bytes = sum(value.nbytes for value in parameters.values())
            if not shards or shard_bytes + module_bytes > MAX_SHARD_BYTES:
                shards.append([])
                shard_bytes = 0
            shard_bytes += module_bytes
            num_parameters = sum(value.numel() for value in parameters.values())
            shards[-1].append(DepthModuleTensors(layer, leaf, tensors, num_parameters))
    return shards


def check_depth_tensors(
    folder: Path, config: DepthAttnConfig, key_prefix: str, entries: Mapping[str, TensorEntry]
) -> set[str]:
    """Check that the depth tensors of a checkpoint are those of its config, in the present or the old layout.

    Args:
        folder: the checkpoint.
        config: its config.
        key_prefix: the part of its keys before `layers.N.`.
        entries: all its tensors by name.

    Returns:
        The names of its depth tensors.

    Raises:
        UserError: if one is missing, has another shape, does not belong to the model, or was written by another
            package.
    """
    found = {name for name in entries if DEPTH_KEY.search(name)}
    check_stock_tensors(folder, {name: entry for name, entry in entries.items() if name not in found})
    in_file = {usual_name(name): name for name in found}
    shards = plan_depth_shards(config, key_prefix)
    planned = {name: shape for shard in shards for module in shard for name, (_, shape, _) in module.tensors.items()}
    stacked = {stacked_name(name) for name in in_file} - {None}
    if stacked and stacked.isdisjoint(in_file):
        planned = in_old_layout(planned, config.text_config.num_hidden_layers)
    if missing := planned.keys() - in_file.keys():
        raise UserError(f"{folder}: lacks depth tensors of its config ({few(sorted(missing))}).")
    if homeless := in_file.keys() - planned.keys():
        raise UserError(
            f"{folder}: has depth tensors that the model of its config does not have ({few(sorted(homeless))})."
        )
    if odd := sorted(name for name, shape in planned.items() if entries[in_file[name]].shape != shape):
        raise UserError(f"{folder}: has depth tensors of other shapes than in its config ({few(odd)}).")
    return found


def depth_values(config: DepthAttnConfig, modules: list[DepthModuleTensors]) -> Iterator[memoryview]:
    """Yield the initial values of one shard in pieces, with at most one module or some rows of a projection in memory.

    Modules are initialised as in a new model: queries, gates and biases are zero, projections are normally distributed
    with the host's `initializer_range` and a fixed seed.

    Args:
        config: the checkpoint's config.
        modules: a shard of `plan_depth_shards`.
    """
    for planned in modules:
        if planned.leaf == "mlp_depth_kv":
            yield from _drawn(config, planned)
        else:
            yield from map(tensor_bytes, initial_values(config, planned).values())


def initial_values(config: DepthAttnConfig, planned: DepthModuleTensors) -> dict[str, Tensor]:
    """Return the initial values of a module by the names of its tensors in the checkpoint.

    Args:
        config: the checkpoint's config.
        planned: a module of `plan_depth_shards` without MoDA's projections, whose initial values are random.
    """
    module = _depth_modules(config, planned.layer)[planned.leaf]
    assert not isinstance(module, MLPDepthKV)
    module.to_empty(device="cpu")
    with torch.no_grad():
        module.init_parameters(init)
    return dict(zip(planned.tensors, module.state_dict().values(), strict=True))


def _depth_modules(
    config: DepthAttnConfig, layer: int | None
) -> Mapping[str, DepthReads | DepthSite | DepthGate | MLPDepthKV | ValueResidual]:
    """Return the depth modules of a layer, or of the base model itself, by their names in it, on the meta device."""
    if layer is None:
        with torch.device("meta"):
            return {DEPTH_READS: DepthReads(config)} if has_depth_reads(config) else {}
    is_last = layer == config.text_config.num_hidden_layers - 1
    leaves = DEPTH_MODULES if is_last else DEPTH_MODULES[:-1]
    with torch.device("meta"):
        sites = {leaf: depth_site(config, 2 * layer + i) for i, leaf in enumerate(leaves)}
        values = value_residual_module(config, layer)
        return {**sites, **depth_kv_modules(config, layer), **({} if values is None else {VALUE_RESIDUAL: values})}


def _drawn(config: DepthAttnConfig, planned: DepthModuleTensors) -> Iterator[memoryview]:
    std = getattr(config.text_config, "initializer_range", 0.02)
    assert planned.layer is not None
    generator = torch.Generator().manual_seed(PROJECTION_SEED + planned.layer)
    for dtype, shape, _ in planned.tensors.values():
        if len(shape) == 1:
            yield tensor_bytes(torch.zeros(shape, dtype=DTYPES[dtype]))
            continue
        num_rows, num_columns = shape
        # In pieces, since a matrix can have hundreds of megabytes (large models with latent attention).
        rows_at_once = max(1, CHUNK_BYTES // (4 * num_columns))
        for start in range(0, num_rows, rows_at_once):
            drawn = torch.empty(min(rows_at_once, num_rows - start), num_columns)
            yield tensor_bytes(drawn.normal_(0.0, std, generator=generator).to(DTYPES[dtype]))


def tensor_bytes(value: Tensor) -> memoryview:
    """Return the data of a tensor as they are in a safetensors file."""
    # numpy has no bfloat16.
    return value.contiguous().flatten().view(torch.uint8).numpy().data
