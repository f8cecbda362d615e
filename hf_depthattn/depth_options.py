"""The choices of `DepthAttnConfig`: its fields by mechanism, and one enumeration per field. Needs no torch."""

from enum import StrEnum

#: Fields that only AttnRes reads.
ATTN_RES_FIELDS = (
    "num_blocks",
    "sublayers_per_block",
    "read_scale",
    "query",
    "depth_activation",
    "key_norm",
    "static_mix",
    "num_depth_heads",
    "depth_window",
    "depth_norm_eps",
)

#: Fields that only MoDA reads, beside `depth_kv` itself.
DEPTH_KV_FIELDS = ("depth_key_rope", "depth_key_norm", "depth_gate", "num_depth_slots")


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


def require_member(field: str, value: str, allowed: type[StrEnum]) -> None:
    """Raises a ValueError that names the field, its value and what is allowed."""
    if value not in set(allowed):
        raise ValueError(f"{field}: {value!r} is not one of {', '.join(repr(str(member)) for member in allowed)}.")
