"""The options of `DepthAttnConfig`, each declared once, and the enumerations of their values. Does not import torch.

`DepthOptions` is the single definition behind the config fields, the arguments of `retrofit`, the options of
`depthattn retrofit`, the model card and the documentation.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from textwrap import indent, wrap
from typing import Any, get_args, get_origin


class DepthConnectionType(StrEnum):
    """Type of the depth connection; `depth_connections.CONNECTIONS` contains the classes."""

    RESIDUAL = "residual"  #: `ResidualSite`, the host's residual stream, for MoDA alone or as a baseline
    ATTN_RES = "attn_res"  #: `AttnResSite`, Attention Residuals (arXiv 2603.15031)
    REZERO = "rezero"  #: `ReZeroSite`, a learned scale per sublayer (arXiv 2003.04887)
    LAYER_SCALE = "layer_scale"  #: `LayerScaleSite`, a learned scale per sublayer and channel (arXiv 2103.17239)
    LAYER_NORM_SCALING = "layer_norm_scaling"  #: `LayerNormScalingSite`, inputs over the square root of their depth
    DEEPNORM = "deepnorm"  #: `DeepNormSite`, Post-LN with a scaled residual stream (arXiv 2203.00555)
    KEEL = "keel"  #: `KeelSite`, a scaled and normalised residual stream (arXiv 2601.19895)
    HIGHWAY = "highway"  #: `HighwaySite`, a gate between stream and output (arXiv 1505.00387)
    X0_LAMBDAS = "x0_lambdas"  #: `X0LambdasSite`, scaled sums of stream and embedding (nanochat)
    LAYER_DROP = "layer_drop"  #: `LayerDropSite`, sublayers dropped in training (arXiv 1909.11556)
    HYPER_CONNECTIONS = "hyper_connections"  #: `HyperConnectionSite`, Hyper-Connections (arXiv 2409.19606)
    MHC = "mhc"  #: `MHCSite`, Manifold-Constrained Hyper-Connections (arXiv 2512.24880)
    MHC_LITE = "mhc_lite"  #: `MHCLiteSite`, mHC-lite (arXiv 2601.05732)
    DENSE_FORMER = "dense_former"  #: `DenseFormerSite`, depth-weighted averages (arXiv 2402.02622)
    DELTA = "delta"  #: `DeltaSite`, Delta Attention Residuals (arXiv 2605.18855)


class ReadScale(StrEnum):
    """Scale of an AttnRes read."""

    MEAN = "mean"  #: a convex combination of the sources (the paper)
    SUM = "sum"  #: the same times the number of sources: with zero queries the residual sum, as retrofitting needs


class QueryType(StrEnum):
    """Query of an AttnRes read."""

    STATIC = "static"  #: a learned vector per site (the paper)
    INPUT = "input"  #: a learned vector plus a projection of the newest source, per token (ablation of the paper)


class DepthActivation(StrEnum):
    """Activation that turns depth scores into weights."""

    SOFTMAX = "softmax"  #: the paper
    SIGMOID = "sigmoid"  #: independent weights (ablation of the paper), scaled so that zero scores give the mean


class HighwayGateType(StrEnum):
    """Gate of a highway network."""

    TOKEN = "token"  #: one gate per sublayer and token
    CHANNEL = "channel"  #: one gate per channel, from a matrix D x D (the paper)


class AttnResSchedule(StrEnum):
    """Schedule of AttnRes reads, at run time only: all schedules compute the same function."""

    AUTO = "auto"  #: grouped, except on a GPU when a model generates token by token
    GROUPED = "grouped"  #: the reads of a group share one pass over the finished sources
    LAYER = "layer"  #: the same with groups within one layer, as transformers' gradient checkpointing has them
    SINGLE = "single"  #: one pass over all sources per read


class StreamMix(StrEnum):
    """Weights of Hyper-Connections."""

    STATIC = "static"  #: learned numbers
    DYNAMIC = "dynamic"  #: the same plus a function of the streams, per token (the paper's default)


class ValueResidualInit(StrEnum):
    """Initial factors of the value residual."""

    HOST = "host"  #: v_l = 0 v_1 + 1 v_l, the values of the host
    RESFORMER = "resformer"  #: v_l = 0.5 v_1 + 0.5 v_l (the paper)


class NormPosition(StrEnum):
    """Position of the norms in a decoder layer."""

    HOST = "host"  #: as in the host
    POST = "post"  #: after the residual sum, `x = norm(x + f(x))` (Post-LN), for hosts trained from scratch


class DepthKVType(StrEnum):
    """Which sublayers write depth slots."""

    ATTENTION = "attention"  #: attention sublayers write their own keys and values; no new parameters
    ATTENTION_MLP = "attention+mlp"  #: MLP sublayers also write, through projections of their input (paper's default)


class DepthKeyRope(StrEnum):
    """Rotary embedding of depth keys."""

    SAME_POSITION = "same_position"  #: depth keys are rotated like the query, so that the rotation cancels
    NONE = "none"  #: depth keys are not rotated, but the query is, as in the released code of MoDA


class DepthKeyNormType(StrEnum):
    """Key norm applied to depth keys, on hosts that normalise keys."""

    WRITER = "writer"  #: the key norm of the layer that writes the slot
    READER = "reader"  #: the key norm of the layer that reads the slot, as in the released code of MoDA


class DepthGateType(StrEnum):
    """Gate on the output of the joint softmax over sequence and depth."""

    HEAD = "head"  #: one per head: out = o_seq + a_h (o_joint - o_seq), initialised to a_h = 0


@dataclass(frozen=True)
class DepthOption:
    """Metadata of an option, beside its name, type and default.

    Attributes:
        help: one or two sentences, for `--help` and for the documentation.
        choices: the enumeration of allowed values, if the option has one.
        connections: the connections that the option configures; with others it has no effect. Empty if it does not
            depend on the connection.
        is_moda: whether the option configures MoDA; without `depth_kv` it then has no effect.
        exact: the only value with which a retrofitted checkpoint reproduces its host; `...` if every value does.
        inexact_reason: why other values do not reproduce the host.
        metavar: the placeholder in `--help`; options without one are given as `--set NAME=VALUE`.
    """

    help: str
    choices: type[StrEnum] | None = None
    connections: tuple[DepthConnectionType, ...] = ()
    is_moda: bool = False
    exact: object = ...
    inexact_reason: str = ""
    metavar: str | None = None

    def has_effect(self, connection: str, depth_kv: str | None) -> bool:
        """Return whether the option has an effect beside these values of the fields `connection` and `depth_kv`."""
        return (not self.connections or connection in self.connections) and not (self.is_moda and depth_kv is None)


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"option": DepthOption(help, **more)})


_ATTN_RES = (DepthConnectionType.ATTN_RES,)
_HIGHWAY = (DepthConnectionType.HIGHWAY,)
_STREAMS = (DepthConnectionType.HYPER_CONNECTIONS, DepthConnectionType.MHC, DepthConnectionType.MHC_LITE)


# No `from __future__ import annotations` here: the config validates values by these types.
@dataclass(kw_only=True, repr=False)
class DepthOptions:
    """The options of depth attention: the fields of `DepthAttnConfig` other than `text_config`."""

    connection: str = _option(
        "attn_res",
        '"attn_res": Attention Residuals; "residual": the residual stream of the host, for MoDA alone or as a '
        "baseline. Others, for comparison (docs/connections.md has their equations): "
        '"rezero", "layer_scale", "x0_lambdas", "layer_drop", "hyper_connections", "mhc", "mhc_lite", "dense_former" '
        'and "delta" can start as the host; "layer_norm_scaling", "deepnorm", "keel" and "highway" cannot, and are '
        "for training from scratch.",
        choices=DepthConnectionType,
        metavar="CONNECTION",
    )
    num_blocks: int | None = _option(
        None,
        "Maximum number of blocks in Block AttnRes (N in the paper), each of `ceil(L / num_blocks)` of the L decoder "
        "layers; `2 L` blocks are Full AttnRes. If `sublayers_per_block` is not given either, the size of a block is "
        "the number of layers nearest to `L / 8`, at least 1. Saved as `sublayers_per_block`.",
        connections=_ATTN_RES,
        metavar="N",
    )
    sublayers_per_block: int | None = _option(
        None,
        "Number of sublayers (attention or MLP, two per decoder layer) in a block; 1 is Full AttnRes. The last block "
        "may be shorter. Cannot be combined with `num_blocks`.",
        connections=_ATTN_RES,
        metavar="S",
    )
    read_scale: str = _option(
        "mean",
        '"mean": a weighted mean of the sources, as in the paper; "sum": the weighted mean times the number of '
        "sources, so that zero queries give the residual stream of the host, up to rounding.",
        choices=ReadScale,
        connections=_ATTN_RES,
        exact="sum",
        inexact_reason="its reads are means of the sources, not sums",
    )
    query: str = _option(
        "static",
        'Query of a read. "static": one learned vector per site; "input": that vector plus a projection of the newest '
        "source, per token.",
        choices=QueryType,
        connections=_ATTN_RES,
    )
    depth_activation: str = _option(
        "softmax",
        'Activation that turns depth scores into weights: "softmax" or "sigmoid".',
        choices=DepthActivation,
        connections=_ATTN_RES,
    )
    key_norm: bool = _option(
        True,
        "Apply RMSNorm to the keys of an AttnRes read; values are never normalised.",
        connections=_ATTN_RES,
    )
    static_mix: bool = _option(
        False,
        "Use input-independent weights: one learned score per source instead of query and keys.",
        connections=_ATTN_RES,
    )
    num_depth_heads: int = _option(
        1,
        "Number of heads of a read, each on its own slice of `hidden_size`.",
        connections=(*_ATTN_RES, DepthConnectionType.DELTA),
    )
    depth_window: int | None = _option(
        None,
        "Read only the embedding and this many of the newest sources. `None`: all sources.",
        connections=_ATTN_RES,
        exact=None,
        inexact_reason="the residual stream of the host is the sum of all sources",
    )
    depth_norm_eps: float | int | None = _option(
        None,
        "Epsilon of the norms of the connection: of the keys of a read, of the stream with KEEL, and of streams "
        "before their projection. `None`: the epsilon of the host's norms.",
        connections=(*_ATTN_RES, *_STREAMS, DepthConnectionType.DELTA, DepthConnectionType.KEEL),
    )
    branch_scale_init: float | int | None = _option(
        None,
        "Initial scale of the outputs of sublayers with ReZero and LayerScale. `None`: that of the papers, 0 for "
        "ReZero, and 0.1, 1e-5 or 1e-6 for LayerScale with up to 18, up to 24 or more decoder layers.",
        connections=(DepthConnectionType.REZERO, DepthConnectionType.LAYER_SCALE),
        exact=1.0,
        inexact_reason="it scales the outputs of sublayers",
    )
    highway_gate: str = _option(
        "channel",
        'Gate of a highway network. "channel": one gate per channel, from a matrix `hidden_size` x `hidden_size` (the '
        'paper); "token": one gate per sublayer and token.',
        choices=HighwayGateType,
        connections=_HIGHWAY,
    )
    highway_bias_init: float | int = _option(
        -2.0,
        "Initial bias of the gates of a highway network, negative in the paper; the initial gate is its sigmoid.",
        connections=_HIGHWAY,
    )
    layer_drop: float | int = _option(
        0.2,
        "Probability with which LayerDrop drops a sublayer in training, for every sublayer and batch.",
        connections=(DepthConnectionType.LAYER_DROP,),
    )
    num_streams: int = _option(
        4,
        "Number of streams of Hyper-Connections (n in the papers), each as wide as `hidden_size`; at most 4 with "
        '`connection="mhc_lite"`.',
        connections=_STREAMS,
    )
    stream_mix: str = _option(
        "dynamic",
        'Weights of Hyper-Connections. "static": learned numbers; "dynamic": the same plus a function of the streams, '
        "per token.",
        choices=StreamMix,
        connections=(DepthConnectionType.HYPER_CONNECTIONS,),
    )
    sinkhorn_iters: int = _option(
        20,
        "Number of Sinkhorn iterations that make the mixing matrix of mHC doubly stochastic.",
        connections=(DepthConnectionType.MHC,),
    )
    depth_kv: str | None = _option(
        None,
        "Mixture-of-Depths Attention: attention also reads depth slots, the keys and values that earlier sublayers "
        'wrote for the same token. "attention": attention sublayers write their own keys and values, without new '
        'parameters; "attention+mlp": MLP sublayers also write, through projections of their input (the default of '
        'the paper). Works with any `connection`; with "residual" it is MoDA alone.',
        choices=DepthKVType,
        metavar="WRITERS",
    )
    depth_key_rope: str = _option(
        "same_position",
        'Rotary embedding of keys in slots. "same_position": rotated like the query, so that the rotation cancels; '
        '"none": not rotated, while the query is (the released code of the authors).',
        choices=DepthKeyRope,
        is_moda=True,
        metavar="ROPE",
    )
    depth_key_norm: str = _option(
        "writer",
        'Norm of keys in slots, on hosts that normalise keys. "writer": the norm of the layer that writes the slot; '
        '"reader": the norm of the layer that reads it (the released code of the authors; training memory then grows '
        "with the square of the number of layers).",
        choices=DepthKeyNormType,
        is_moda=True,
        metavar="LAYER",
    )
    depth_gate: str | None = _option(
        None,
        'Gate on the attention over depth. "head": one gate `a_h` per head, initialised to 0, `out = o_seq + a_h '
        "(o_joint - o_seq)`, so that a retrofitted checkpoint computes what its host computes. The paper has no gate.",
        choices=DepthGateType,
        is_moda=True,
        exact="head",
        inexact_reason="its softmax reads the depth slots from the start",
        metavar="GATE",
    )
    depth_kv_bias: bool = _option(
        False,
        'Give the projections of MLP inputs, with `depth_kv="attention+mlp"`, a bias (the released code of the '
        "authors).",
        is_moda=True,
    )
    num_depth_slots: int | None = _option(
        None, "Read only this many of the newest slots; by default all.", is_moda=True, metavar="N"
    )
    value_residual: bool = _option(
        False,
        "Value residual (ResFormer, arXiv 2410.17897): attention uses `c1 v_1 + c2 v_l` instead of its values v_l: "
        "v_1 are the values of the first attention layer, c1 and c2 two learned factors per layer. Works with any "
        "`connection` and with MoDA.",
    )
    value_residual_init: str = _option(
        "host",
        'Initial factors of the value residual. "host": c1 = 0, c2 = 1, which computes what the host computes; '
        '"resformer": 0.5 and 0.5, as in the paper.',
        choices=ValueResidualInit,
        exact="host",
        inexact_reason="its attention starts with values of the first layer",
    )
    # `_option` returns a field, whose default is immutable.
    depth_slots: list[list[int]] | None = _option(  # noqa: RUF009
        None,
        "The slots that each layer reads: one list per decoder layer with the numbers of the sublayers that write "
        "them (2 i for the attention and 2 i + 1 for the MLP of layer i), in ascending order. Instead of "
        "`num_depth_slots`.",
        is_moda=True,
    )
    norm_position: str = _option(
        "host",
        'Position of the norms. "host": as in the host; "post": `x = norm(x + f(x))` instead of the pre-norm of the '
        'host, for training from scratch; requires `connection="residual"` or "deepnorm", and "deepnorm" requires it.',
        choices=NormPosition,
        exact="host",
        inexact_reason="its norms come after the residual sums",
    )
    # As for `depth_slots`.
    norm_eps_overrides: dict[str, float | int] | None = _option(  # noqa: RUF009
        None,
        "Epsilon of norms of the host that have another one than its config, by name in the base model or by the end "
        'of their names, such as `{"layers.0.input_layernorm": 1e-6, "q_norm": 1e-5}`. Imported checkpoints have it '
        "where their training code used several.",
        exact=None,
        inexact_reason="the norms of the host have the epsilon of its config",
    )


#: Option name -> its dataclass field, in order of declaration.
_FIELDS = {each.name: each for each in dataclasses.fields(DepthOptions)}

#: Option name -> its metadata.
DEPTH_OPTIONS: dict[str, DepthOption] = {name: each.metadata["option"] for name, each in _FIELDS.items()}

# Pairs of options of which only one can be given.
_EXCLUSIVE = (("num_blocks", "sublayers_per_block"), ("num_depth_slots", "depth_slots"))


def option_default(name: str) -> object:
    """Return the default value of an option."""
    return _FIELDS[name].default


def option_type(name: str) -> type:
    """Return the type of an option's values, ignoring `None`."""
    declared: Any = _FIELDS[name].type
    kinds = [kind for kind in get_args(declared) if kind is not type(None)]
    kind = kinds[0] if kinds else declared
    return get_origin(kind) or kind


def require_member(field: str, value: str, allowed: type[StrEnum]) -> None:
    """Raise a ValueError naming the field, its value and the allowed values if the value is not one of them."""
    if value not in set(allowed):
        raise ValueError(f"{field}: {value!r} is not one of {', '.join(repr(str(member)) for member in allowed)}.")


def replace_options(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return saved values without those that given ones exclude: a size of blocks or choice of slots in another unit.

    Args:
        saved: values by names, such as the fields of a config.json.
        given: the values that will replace them; `None` excludes nothing.
    """
    excluded = {name for pair in _EXCLUSIVE for name in pair if any(given.get(other) is not None for other in pair)}
    return {name: value for name, value in saved.items() if name not in excluded}


def describe_options() -> str:
    """Return the options as entries of an `Args` section, in the docstring format of transformers."""
    lines = []
    for name, option in DEPTH_OPTIONS.items():
        default = option_default(name)
        shown = f'"{default}"' if isinstance(default, str) else default
        kind = option_type(name).__name__
        lines.append(f"{name} (`{kind}`, *optional*{'' if default is None else f', defaults to `{shown}`'}):")
        lines += wrap(option.help, 108, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return indent("\n".join(lines), 8 * " ")
