"""The depth parameters of a fresh checkpoint as shards: what is in them, and their initial values piece by piece."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import initialization as init

from ..checkpoints.checkpoint_files import CHUNK_BYTES, TensorEntry
from ..checkpoints.foreign_tensors import check_stock_tensors
from ..configuration_depthattn import DepthAttnConfig
from ..connection_base import DepthSite
from ..depth_connections import DEPTH_MODULES, depth_site
from ..errors import UserError
from ..moda_slots import DEPTH_KV_MODULES, DepthGate, MLPDepthKV, depth_kv_modules
from ..utils.text_table import few

#: Names of our modules in a decoder layer, and a tensor of one of them in a checkpoint.
DEPTH_LEAVES = (*DEPTH_MODULES, *DEPTH_KV_MODULES)
DEPTH_KEY = re.compile(rf"(?:^|\.)((?:layers|h)\.\d+\.(?:{'|'.join(DEPTH_LEAVES)}))\.")

#: The size at which transformers starts a new shard.
MAX_SHARD_BYTES = 5 * 10**9

#: MoDA's projections of layer i are drawn with the seed `PROJECTION_SEED + i`: the same retrofit, the same weights.
PROJECTION_SEED = 0

# The types of weights, as safetensors names them.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class DepthModuleTensors:
    """The tensors of one depth module.

    Attributes:
        layer: number of its decoder layer.
        leaf: its name in the layer.
        tensors: name -> (dtype, shape, bytes) in the order of the module.
        num_parameters: how many numbers they are.
    """

    layer: int
    leaf: str
    tensors: dict[str, tuple[str, tuple[int, ...], int]]
    num_parameters: int


def usual_name(name: str) -> str:
    """A tensor's name with `model.layers.` before its layer's number, where files of EXAONE have `transformer.h.`.

    transformers reads both, and saves its own tensors under the second.
    """
    return re.sub(r"^transformer\.h\.", "model.layers.", name)


def weights_dtype(entries: Iterable[TensorEntry]) -> torch.dtype:
    """The dtype of most weights of a checkpoint, float32 if none is in one for training.

    Args:
        entries: its tensors.
    """
    num_bytes = dict.fromkeys(_DTYPES, 0)
    for entry in entries:
        if entry.dtype in num_bytes:
            num_bytes[entry.dtype] += entry.end - entry.start
    return _DTYPES[max(num_bytes, key=num_bytes.__getitem__)]


def plan_depth_shards(
    config: DepthAttnConfig, key_prefix: str, dtype: torch.dtype = torch.float32
) -> list[list[DepthModuleTensors]]:
    """Which depth tensors there are, in shards of at most `MAX_SHARD_BYTES`; a module is never split.

    Args:
        config: the checkpoint's config.
        key_prefix: what stands before `layers.N.` in its keys.
        dtype: that of the host's weights, which MoDA's projections share; all others are float32.
    """
    shards: list[list[DepthModuleTensors]] = []
    shard_bytes = 0
    for layer in range(config.text_config.num_hidden_layers):
        for leaf, module in _depth_modules(config, layer).items():
            parameters = {
                name: value.to(dtype) if isinstance(module, MLPDepthKV) else value
                for name, value in module.state_dict().items()
            }
            if not parameters:
                continue
            tensors = {
                f"{key_prefix}layers.{layer}.{leaf}.{name}": (
                    _DTYPE_NAMES[value.dtype],
                    tuple(value.shape),
                    value.nbytes,
                )
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
    """Refuse a checkpoint whose depth tensors are not those of its config.

    Args:
        folder: the checkpoint.
        config: its config.
        key_prefix: what stands before `layers.N.` in its keys.
        entries: all its tensors by name.

    Returns:
        The names of its depth tensors.

    Raises:
        UserError: one is missing, or has no place in the model, or is of another package.
    """
    found = {name for name in entries if DEPTH_KEY.search(name)}
    check_stock_tensors(folder, {name: entry for name, entry in entries.items() if name not in found})
    in_file = {usual_name(name): name for name in found}
    planned = {name for shard in plan_depth_shards(config, key_prefix) for module in shard for name in module.tensors}
    if missing := planned - in_file.keys():
        raise UserError(f"{folder}: lacks depth tensors of its model ({few(sorted(missing))}).")
    if homeless := in_file.keys() - planned:
        raise UserError(
            f"{folder}: has depth tensors without a place in the model of its config ({few(sorted(homeless))})."
        )
    return found


def depth_values(config: DepthAttnConfig, modules: list[DepthModuleTensors]) -> Iterator[memoryview]:
    """The initial values of the modules of one shard, in pieces: memory holds one site or a few rows of a projection.

    They are those of a new model: queries and gates are zero, projections are drawn from the normal distribution with
    the host's `initializer_range`, from a fixed seed.

    Args:
        config: the checkpoint's config.
        modules: a shard of `plan_depth_shards`.
    """
    for planned in modules:
        module = _depth_modules(config, planned.layer)[planned.leaf]
        if isinstance(module, MLPDepthKV):
            yield from _drawn(config, planned)
            continue
        module.to_empty(device="cpu")
        with torch.no_grad():
            module.init_parameters(init)
        for value in module.state_dict().values():
            yield _bytes(value)


def _depth_modules(config: DepthAttnConfig, layer: int) -> dict[str, DepthSite | DepthGate | MLPDepthKV]:
    """The depth modules of a layer by leaf name, on the meta device."""
    is_last = layer == config.text_config.num_hidden_layers - 1
    leaves = DEPTH_MODULES if is_last else DEPTH_MODULES[:-1]
    with torch.device("meta"):
        sites = {leaf: depth_site(config, 2 * layer + i) for i, leaf in enumerate(leaves)}
        return {**sites, **depth_kv_modules(config, layer)}


def _drawn(config: DepthAttnConfig, planned: DepthModuleTensors) -> Iterator[memoryview]:
    std = getattr(config.text_config, "initializer_range", 0.02)
    generator = torch.Generator().manual_seed(PROJECTION_SEED + planned.layer)
    for dtype, (num_rows, num_columns), _ in planned.tensors.values():
        # In pieces: with latent attention, one matrix of a large model has hundreds of megabytes.
        rows_at_once = max(1, CHUNK_BYTES // (4 * num_columns))
        for start in range(0, num_rows, rows_at_once):
            drawn = torch.empty(min(rows_at_once, num_rows - start), num_columns)
            yield _bytes(drawn.normal_(0.0, std, generator=generator).to(_DTYPES[dtype]))


def _bytes(value: Tensor) -> memoryview:
    # numpy has no bfloat16.
    return value.contiguous().flatten().view(torch.uint8).numpy().data
