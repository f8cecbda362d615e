"""Convert a checkpoint with AttnRes to a folder of flash-linear-attention's model `transformer`."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from ..attn_res_reads import DEPTH_READS
from ..checkpoints.carried_files import carry_files, check_carried
from ..checkpoints.foreign_tensors import COMPUTED
from ..checkpoints.old_sites import IN_OLD_SITE, site_name
from ..checkpoints.weights_check import check_weights
from ..configuration_depthattn import DepthAttnConfig
from ..depth_options import DEPTH_OPTIONS, DepthConnectionType, option_default
from ..errors import UserError
from ..modeling_depthattn import DepthAttnForCausalLM
from ..utils.text_table import few, size, table
from .depth_shards import DTYPES, check_depth_tensors, weights_dtype
from .importers.fla import LAYERS, MODEL_TYPE, QK_NORM_EPS, READS, RENAMING
from .model_card import write_export_card
from .new_tensors import NewTensor, Piece, write_new_tensors
from .output_folder import checked_folders, complete_folder
from .source import DepthSource, read_depth_source

_HOSTS = ("llama", "mistral", "qwen2", "qwen3")
# Options that the format has; all others must have their defaults.
_EXPRESSED = ("connection", "num_blocks", "sublayers_per_block", "depth_norm_eps", "norm_eps_overrides")
_QK_NORMS = ("q_norm", "k_norm")
# Qwen3 has a bias on all projections of attention or on none, so an import adds these as zeros.
_OUTPUT_BIAS = ".self_attn.o_proj.bias"
# Names of modules, the other way round.
_IN_LAYER = {ours: theirs for theirs, ours in RENAMING.in_layer.items()}
_ON_TOP = {ours: theirs for theirs, ours in RENAMING.on_top.items()}


@dataclass(frozen=True)
class ExportReport:
    """The report of `export_fla`.

    Attributes:
        source: folder or Hub id of the checkpoint.
        output_dir: the new folder.
        block_size: number of sublayers per block; 1 is Full AttnRes.
        num_tensors: number of tensors of the new folder.
        scaled: projections that were multiplied because the norm after them has another epsilon in the format.
        bytes_written: size of the weights.
        seconds: duration.
    """

    source: str
    output_dir: str
    block_size: int
    num_tensors: int
    scaled: tuple[str, ...]
    bytes_written: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("source", self.source),
            ("output", f"{self.output_dir} (flash-linear-attention, attnres_block_size {self.block_size})"),
            ("tensors", f"{self.num_tensors}"),
            *([("scaled", f"{few(self.scaled)}: the norms after them have another epsilon")] if self.scaled else ()),
            ("weights", f"{size(self.bytes_written)} written"),
            ("time", f"{self.seconds:.1f} s"),
        ]
        return table(rows)


def export_fla(
    source: str | Path,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    copy_tokenizer_code: bool = False,
    progress: bool | None = None,
) -> ExportReport:
    """Convert a causal language model with AttnRes to a folder of flash-linear-attention's model `transformer`.

    The code of that library then computes the same logits, up to rounding. Its norms of queries and keys have the
    epsilon 1e-5: with another one, the projections before them are multiplied by `sqrt(1e-5 / eps)`, which is exact
    but for the rounding of the weights to their dtype.

    Args:
        source: local folder or Hub id of the checkpoint.
        output_dir: the folder to create.
        overwrite: replace an existing checkpoint at `output_dir`, once the new one is complete.
        revision: branch, tag or commit of a Hub repository.
        copy_tokenizer_code: copy the code of a tokenizer with custom code, instead of raising.
        progress: whether to show progress; `None`: a bar on a terminal, a line every few seconds elsewhere.

    Returns:
        The report; `str` formats it as a table.

    Raises:
        UserError: if the format cannot express the model (the message names what), the checkpoint is damaged, or the
            output cannot be written.
    """
    started = time.perf_counter()
    folder, hub_id, target = checked_folders(source, output_dir, overwrite=overwrite, revision=revision)
    depth = read_depth_source(folder)
    check_carried(folder, depth.weights.weight_map.values(), copy_tokenizer_code=copy_tokenizer_code)
    _check_expressed(depth)
    fields = _fields(depth)
    factor = _qk_factor(depth)
    tensors = _tensors(depth, factor)
    scaled = sorted(name for name, each in tensors.items() if any(p.factors is not None for p in each.pieces))

    with complete_folder(target, overwrite) as partial:
        carry_files(folder, partial)
        bytes_written = write_new_tensors(partial, depth.weights, tensors, progress=progress)
        write_export_card(
            partial,
            depth.config,
            name=target.name,
            hub_id=hub_id,
            source_folder=folder,
            depth_class=depth.architecture.depth_class,
        )
        # Last, since an incomplete folder without config cannot be loaded.
        (partial / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return ExportReport(
        source=str(source),
        output_dir=str(output_dir),
        block_size=fields["attnres_block_size"],
        num_tensors=len(tensors),
        scaled=tuple(scaled),
        bytes_written=bytes_written,
        seconds=time.perf_counter() - started,
    )


def _check_expressed(depth: DepthSource) -> None:
    """Check that the format has everything that the model has."""
    config, host = depth.config, depth.config.host_config
    problem = None
    if depth.architecture.depth_class != DepthAttnForCausalLM.__name__:
        problem = f"is a {depth.architecture.depth_class}, but the format has causal language models only"
    elif depth.key_prefix != "model.":
        problem = f"its keys start with {depth.key_prefix!r} instead of 'model.'; load it and save it again"
    elif config.connection != DepthConnectionType.ATTN_RES:
        problem = f"connection is {str(config.connection)!r}, but the format has 'attn_res' only"
    elif host.model_type not in _HOSTS:
        problem = f"its host is {host.model_type!r}, but the format has {', '.join(_HOSTS)} only"
    if problem is None:
        problem = _odd_option(config) or _odd_host(host, config) or _odd_bias(depth)
    if problem is not None:
        raise UserError(f"{depth.folder}: cannot be exported to flash-linear-attention: {problem}.")


def _odd_option(config: DepthAttnConfig) -> str | None:
    """Describe an option that the format does not have; `None` if there is none."""
    for name, option in DEPTH_OPTIONS.items():
        value, default = getattr(config, name), option_default(name)
        if name in _EXPRESSED or value == default or not option.has_effect(config.connection, config.depth_kv):
            continue
        return f"{name} is {value!r}, but the format has {default!r} only"
    block_size = config.block_size_sublayers
    if block_size != 1 and block_size % 2:
        return f"sublayers_per_block is {block_size}, but the format has 1 or an even number"
    host_eps = config.host_config.rms_norm_eps
    if config.resolved_depth_norm_eps != host_eps:
        return f"depth_norm_eps is {config.depth_norm_eps}, but the format has that of the host, {host_eps}"
    for name in config.norm_eps_overrides or {}:
        if name not in _QK_NORMS:
            return f"norm_eps_overrides has {name!r}, but in the format only norms of queries and keys differ"
    return None


def _odd_host(host: PreTrainedConfig, config: DepthAttnConfig) -> str | None:
    """Describe a field of the host that the format does not have; `None` if there is none."""
    rope = host.rope_parameters or {}
    windows = {_window(host, layer) for layer in range(host.num_hidden_layers)}
    head_dim = getattr(host, "head_dim", None) or host.hidden_size // host.num_attention_heads
    if host.hidden_act not in ("silu", "swish"):
        return f"hidden_act is {host.hidden_act!r}, but the format has 'silu' only"
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rope_parameters are {rope}, but the format has the default rotation only"
    if head_dim * host.num_attention_heads != host.hidden_size:
        return f"head_dim is {head_dim}, but in the format it is hidden_size / num_attention_heads"
    if getattr(host, "mlp_bias", False) or (host.model_type == "llama" and host.attention_bias):
        return "attention_bias or mlp_bias is true, but the format has biases of queries, keys and values only"
    if len(windows) > 1:
        return "some layers have a sliding window and others not, but in the format all layers are alike"
    return None


def _odd_bias(depth: DepthSource) -> str | None:
    """Describe a bias of an output projection that is not zero; `None` if there is none."""
    for name in depth.entries:
        if name.endswith(_OUTPUT_BIAS) and _read(depth, name).any():
            return f"attention_bias is true and {name} is not zero, but the format has no bias of that projection"
    return None


def _read(depth: DepthSource, name: str) -> Tensor:
    with safe_open(depth.folder / depth.weights.weight_map[name], framework="pt") as file:
        values: Tensor = file.get_tensor(name)
    return values


def _window(host: PreTrainedConfig, layer: int) -> int | None:
    types = getattr(host, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    if types is None and host.model_type != "mistral":
        return None
    window: int | None = host.sliding_window
    return window


def _fields(depth: DepthSource) -> dict[str, Any]:
    """Return the config.json."""
    config, host = depth.config, depth.config.host_config
    return {
        "architectures": ["TransformerForCausalLM"],
        "attnres_block_size": config.block_size_sublayers,
        "bos_token_id": host.bos_token_id,
        "dtype": str(weights_dtype(depth.entries.values())).removeprefix("torch."),
        "eos_token_id": host.eos_token_id,
        "hidden_act": "swish",
        "hidden_size": host.hidden_size,
        "initializer_range": host.initializer_range,
        "intermediate_size": host.intermediate_size,
        "max_position_embeddings": host.max_position_embeddings,
        "model_type": MODEL_TYPE,
        "norm_eps": host.rms_norm_eps,
        "num_heads": host.num_attention_heads,
        "num_hidden_layers": host.num_hidden_layers,
        "num_kv_heads": host.num_key_value_heads,
        "pad_token_id": host.pad_token_id,
        "qk_norm": host.model_type == "qwen3",
        "qkv_bias": host.model_type == "qwen2" or getattr(host, "attention_bias", False),
        "rope_theta": host.rope_parameters["rope_theta"],
        "tie_word_embeddings": host.tie_word_embeddings,
        "vocab_size": host.vocab_size,
        "window_size": _window(host, 0),
    }


def _qk_factor(depth: DepthSource) -> dict[str, float]:
    """Return the factors of projections before norms that have another epsilon in the format.

    `w x / sqrt(mean(x^2) + e)` with the epsilon e' is the same norm of `x sqrt(e' / e)`.
    """
    if depth.config.host_config.model_type != "qwen3":
        return {}
    overrides = depth.config.norm_eps_overrides or {}
    factors = {}
    for norm in _QK_NORMS:
        eps = overrides.get(norm, depth.config.host_config.rms_norm_eps)
        if eps != QK_NORM_EPS:
            factors[f"self_attn.{norm[0]}_proj"] = math.sqrt(QK_NORM_EPS / eps)
    return factors


def _tensors(depth: DepthSource, qk_factors: dict[str, float]) -> dict[str, NewTensor]:
    """Return the tensors of the format by name."""
    config, host = depth.config, depth.config.host_config
    depth_names = check_depth_tensors(depth.folder, config, depth.key_prefix, depth.entries)
    dtype = _dtype_of_reads(depth, depth_names)
    not_copied = depth_names | set(check_weights(str(depth.folder), config, DepthAttnForCausalLM, depth.entries))
    if host.tie_word_embeddings:
        not_copied.add("lm_head.weight")
    tensors = {}
    for name, entry in depth.entries.items():
        if name in not_copied or COMPUTED.search(name) or name.endswith(_OUTPUT_BIAS):
            continue
        module, _, leaf = name.rpartition(".")
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        new_module = f"{LAYERS}{layer[1]}.{_IN_LAYER[layer[2]]}" if layer else _ON_TOP[module]
        factor = qk_factors.get(layer[2]) if layer else None
        tensors[f"{new_module}.{leaf}"] = NewTensor(entry.dtype, entry.shape, (Piece(name, factors=factor),))
    for site, names in enumerate(READS.of_sites(LAYERS, host.num_hidden_layers)):
        assert names is not None, "the format has a read at every site"
        query, norm = (_read_piece(depth, site, parameter) for parameter in ("query", "key_norm"))
        tensors[names[0]] = NewTensor(dtype, (1, host.hidden_size), (query,))
        tensors[names[1]] = NewTensor(dtype, (host.hidden_size,), (norm,))
    return tensors


def _dtype_of_reads(depth: DepthSource, names: Iterable[str]) -> str:
    """Return the dtype of queries and key norms: that of the weights if it keeps all their values, else float32.

    The library casts them to the dtype of the model when it loads them.
    """
    dtype = weights_dtype(depth.entries.values())
    reads = [_read(depth, name) for name in names]
    is_exact = all(torch.equal(values.to(dtype).to(values.dtype), values) for values in reads)
    return next(name for name, each in DTYPES.items() if each == dtype) if is_exact else "F32"


def _read_piece(depth: DepthSource, site: int, parameter: str) -> Piece:
    """Return the query or key norm of a site, in the present or the old layout."""
    stacked = f"{depth.key_prefix}{DEPTH_READS}.{parameter}"
    if stacked in depth.entries:
        return Piece(stacked, site, 1)
    old_site = f"{depth.key_prefix}{site_name(site, depth.config.host_config.num_hidden_layers)}"
    return Piece(f"{old_site}.{IN_OLD_SITE[parameter]}")
