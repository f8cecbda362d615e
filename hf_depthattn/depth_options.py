"""The options of `DepthAttnConfig`, each declared once, and the enumerations of their values. Needs no torch.

The config has these fields, `depthattn retrofit` and `retrofit` take them, and the model card and the documentation
describe them, all from `DepthOptions`.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from textwrap import indent, wrap
from typing import Any, get_args


class DepthConnectionType(StrEnum):
    """How a sublayer gets its input and where its output goes; `depth_connections.CONNECTIONS` holds the classes."""

    RESIDUAL = "residual"  #: `ResidualSite`, the host unchanged, for controls
    ATTN_RES = "attn_res"  #: `AttnResSite`, Attention Residuals (arXiv 2603.15031)


class ReadScale(StrEnum):
    """Scale of an AttnRes read."""

    MEAN = "mean"  #: the paper: a convex mix of the sources
    SUM = "sum"  #: the mix times its number of sources: zero queries give the residual sum, which retrofitting needs


class QueryType(StrEnum):
    """Where the query of an AttnRes read comes from."""

    STATIC = "static"  #: a learned vector per site (the paper)
    INPUT = "input"  #: the same plus a projection of the newest source, per token (ablation of the paper)


class DepthActivation(StrEnum):
    """What turns depth scores into weights."""

    SOFTMAX = "softmax"  #: the paper
    SIGMOID = "sigmoid"  #: no competition between sources (ablation of the paper), scaled to the mean at zero scores


class NormPosition(StrEnum):
    """Where the norms of a decoder layer stand."""

    HOST = "host"  #: where the host has them
    POST = "post"  #: after the residual sum, `x = norm(x + f(x))` (Post-LN), for hosts trained from scratch


class DepthKVType(StrEnum):
    """Which sublayers write depth slots."""

    ATTENTION = "attention"  #: attention sublayers, their own keys and values; no parameters
    ATTENTION_MLP = "attention+mlp"  #: MLP sublayers too, through projections of their input (the paper's default)


class DepthKeyRope(StrEnum):
    """Rotation of depth keys."""

    SAME_POSITION = "same_position"  #: query and depth key rotated alike, so that the rotation cancels
    NONE = "none"  #: a rotated query meets unrotated keys, as in the official language-model recipe


class DepthKeyNormType(StrEnum):
    """Whose key norm depth keys go through, on hosts that normalise keys."""

    WRITER = "writer"  #: that of the layer that writes the slot
    READER = "reader"  #: that of the layer that reads it, as in the official recipe


class DepthGateType(StrEnum):
    """A gate on the joint softmax."""

    HEAD = "head"  #: out = o_seq + a_h (o_joint - o_seq), a_h = 0 at the start


class Mechanism(StrEnum):
    """The part of the model that an option belongs to; without it, the option has no effect."""

    ATTN_RES = "connection='attn_res'"
    DEPTH_KV = "depth_kv"


@dataclass(frozen=True)
class DepthOption:
    """What is known about an option beside its name, type and default.

    Attributes:
        help: one or two sentences, for `--help` and for the documentation.
        choices: the values of an option that names one of several kinds.
        mechanism: what the option belongs to; `None` for both.
        exact: the only value with which a retrofitted checkpoint computes what its host does; `...` where every
            value does.
        inexact_reason: why other values do not.
        metavar: the placeholder in `--help`; options without one are given as `--set NAME=VALUE`.
    """

    help: str
    choices: type[StrEnum] | None = None
    mechanism: Mechanism | None = None
    exact: object = ...
    inexact_reason: str = ""
    metavar: str | None = None


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"option": DepthOption(help, **more)})


# No `from __future__ import annotations` here: the config validates values by these types.
@dataclass(kw_only=True, repr=False)
class DepthOptions:
    """The options of depth attention, the fields of `DepthAttnConfig` beside `text_config`."""

    connection: str = _option(
        "attn_res",
        '"attn_res": Attention Residuals; "residual": the residual sums of the host, for MoDA alone or for a control.',
        choices=DepthConnectionType,
        metavar="CONNECTION",
    )
    num_blocks: int | None = _option(
        None,
        "Block AttnRes with at most this many blocks (N in the paper), of `ceil(2 L / num_blocks)` sublayers each. 8, "
        "or the number of sublayers if that is smaller, when neither this nor `sublayers_per_block` is given.",
        mechanism=Mechanism.ATTN_RES,
        metavar="N",
    )
    sublayers_per_block: int | None = _option(
        None,
        "Sublayers (attention or MLP, two per decoder layer) in a block; 1 is Full AttnRes. The last block may be "
        "short. Not together with `num_blocks`.",
        mechanism=Mechanism.ATTN_RES,
        metavar="S",
    )
    read_scale: str = _option(
        "mean",
        '"mean" is the paper. "sum" multiplies each mix by its number of sources, so that zero queries reproduce the '
        "residual stream of the host exactly.",
        choices=ReadScale,
        mechanism=Mechanism.ATTN_RES,
        exact="sum",
        inexact_reason="its reads are means",
    )
    query: str = _option(
        "static",
        '"static": one learned vector per site; "input": plus a projection of the newest source of the token.',
        choices=QueryType,
        mechanism=Mechanism.ATTN_RES,
    )
    depth_activation: str = _option(
        "softmax",
        'What turns scores into weights: "softmax" or "sigmoid".',
        choices=DepthActivation,
        mechanism=Mechanism.ATTN_RES,
    )
    key_norm: bool = _option(
        True, "RMS-normalise the keys; values are never normalised.", mechanism=Mechanism.ATTN_RES
    )
    static_mix: bool = _option(
        False,
        "Mixing that does not depend on the input: a learned score per source instead of query and key.",
        mechanism=Mechanism.ATTN_RES,
    )
    num_depth_heads: int = _option(
        1, "Heads of the depth softmax, each on its slice of `hidden_size`.", mechanism=Mechanism.ATTN_RES
    )
    depth_window: int | None = _option(
        None,
        "Read only the embedding and this many newest sources. `None` reads all.",
        mechanism=Mechanism.ATTN_RES,
        exact=None,
        inexact_reason="the residual sum of the host holds every source",
    )
    depth_norm_eps: int | float = _option(1e-6, "Epsilon of the key norm.", mechanism=Mechanism.ATTN_RES)
    depth_kv: str | None = _option(
        None,
        "Mixture-of-Depths Attention: attention also reads the keys and values that earlier sublayers wrote for the "
        'same token. "attention": attention sublayers write theirs, without new parameters; "attention+mlp": MLP '
        "sublayers write too, through projections of their input (the default of the paper). Works with any "
        '`connection`; with "residual" it is MoDA alone.',
        choices=DepthKVType,
        metavar="WRITERS",
    )
    depth_key_rope: str = _option(
        "same_position",
        '"same_position": depth keys are rotated as the query is, which cancels; "none": a rotated query meets '
        "unrotated depth keys (the official language-model recipe).",
        choices=DepthKeyRope,
        mechanism=Mechanism.DEPTH_KV,
        metavar="ROPE",
    )
    depth_key_norm: str = _option(
        "writer",
        'On hosts that normalise keys: with the norm of the layer that writes ("writer"), or of the one that reads '
        '("reader", the official recipe; training memory then grows with the square of the depth).',
        choices=DepthKeyNormType,
        mechanism=Mechanism.DEPTH_KV,
        metavar="LAYER",
    )
    depth_gate: str | None = _option(
        None,
        '`None` is the paper. "head": `out = o_seq + a_h (o_joint - o_seq)` with `a_h = 0` at the start, one gate per '
        "head, which leaves a retrofitted checkpoint as it was.",
        choices=DepthGateType,
        mechanism=Mechanism.DEPTH_KV,
        exact="head",
        inexact_reason="its softmax reads the depth slots from the start",
        metavar="GATE",
    )
    num_depth_slots: int | None = _option(
        None, "Read only this many newest slots. `None` reads all.", mechanism=Mechanism.DEPTH_KV, metavar="N"
    )
    norm_position: str = _option(
        "host",
        '"post": `x = norm(x + f(x))` instead of the pre-norm of the host, for training from scratch, with '
        '`connection="residual"`.',
        choices=NormPosition,
        exact="host",
        inexact_reason="its norms stand behind the residual sums",
    )


#: Name of an option -> its dataclass field, in their order.
_FIELDS = {each.name: each for each in dataclasses.fields(DepthOptions)}

#: Name of an option -> what is known about it.
DEPTH_OPTIONS: dict[str, DepthOption] = {name: each.metadata["option"] for name, each in _FIELDS.items()}


def option_default(name: str) -> object:
    """The default value of an option."""
    return _FIELDS[name].default


def option_type(name: str) -> type:
    """The type of the values of an option, apart from `None`."""
    declared: Any = _FIELDS[name].type
    kinds = [kind for kind in get_args(declared) if kind is not type(None)]
    return kinds[0] if kinds else declared


def options_of(mechanism: Mechanism) -> list[str]:
    """The options that only have an effect with a mechanism."""
    return [name for name, option in DEPTH_OPTIONS.items() if option.mechanism == mechanism]


def require_member(field: str, value: str, allowed: type[StrEnum]) -> None:
    """Raises a ValueError that names the field, its value and what is allowed."""
    if value not in set(allowed):
        raise ValueError(f"{field}: {value!r} is not one of {', '.join(repr(str(member)) for member in allowed)}.")


def describe_options() -> str:
    """The options as lines of the `Args` section of a class, as transformers writes them."""
    lines = []
    for name, option in DEPTH_OPTIONS.items():
        default = option_default(name)
        shown = f'"{default}"' if isinstance(default, str) else default
        kind = option_type(name).__name__
        lines.append(f"{name} (`{kind}`, *optional*{'' if default is None else f', defaults to `{shown}`'}):")
        lines += wrap(option.help, 108, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return indent("\n".join(lines), 8 * " ")
