"""The arms of the study, one row each: what is trained, and with what it is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: The arm that most others are compared with, and whose initial weights of the host all arms share.
REFERENCE = "prenorm"
#: The same arm with smaller initial outputs, the better baseline: gains over it are no effect of the initial weights.
SCALED = "prenorm_scaled"
#: The arm that retrofitted ones are compared with.
CONTINUED = "retrofit_control"


@dataclass(frozen=True)
class Arm:
    """An arm of the study.

    Attributes:
        label: its name in tables.
        fields: fields of `DepthAttnConfig` other than the host.
        baseline: the arm that its paired differences are taken to.
        learning_rates: peak learning rates tried on seed 0. While the best is the smallest or the largest, the
            neighbour beyond it is tried as well.
        start: the arm whose trained model is continued; `None` for training from scratch.
        has_scaled_outputs: whether projections into the residual stream start `sqrt(2 * num_layers)` times smaller, as
            in GPT-2, so that the stream of a deep model starts as large as that of a shallow one.
        is_bounded: whether the scheme bounds the stream of an untrained model itself.
        depth_lr_factors: learning rates of the depth parameters relative to `learning_rate`, tried on seed 0. An arm
            with several of them has the best learning rate of its baseline.
    """

    label: str
    fields: Mapping[str, Any] = field(hash=False)
    baseline: str = REFERENCE
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    has_scaled_outputs: bool = False
    is_bounded: bool = False
    start: str | None = None
    depth_lr_factors: tuple[float, ...] = (1.0,)

    @property
    def is_like_scaled(self) -> bool:
        """Whether a difference to scaled PreNorm is no effect of the initial weights."""
        return self.has_scaled_outputs or self.is_bounded


_RESIDUAL = {"connection": "residual"}
_BLOCK = {"connection": "attn_res", "num_blocks": 8}
_MODA = {"depth_kv": "attention+mlp"}
_POST = {"norm_position": "post"}
_STREAMS = {"num_streams": 4}
# Values with which a retrofitted model starts as its host.
_GATED_MODA = {**_MODA, "depth_gate": "head"}
_BLOCK_AS_HOST = {**_BLOCK, "read_scale": "sum"}
# Post-norm diverges at rates that suit pre-norm.
_LOWER_RATES = (5e-4, 1e-3, 2e-3)
_FACTORS = (1.0, 3.0, 10.0)
# Arms that are compared with the better baseline, and share its initial weights.
_AS_SCALED: dict[str, Any] = {"baseline": SCALED, "has_scaled_outputs": True}

#: Name -> arm, in the order in which they are trained.
ARMS: dict[str, Arm] = {
    REFERENCE: Arm("PreNorm", _RESIDUAL),
    "block_attn_res": Arm("Block AttnRes", _BLOCK),
    "full_attn_res": Arm("Full AttnRes", {"connection": "attn_res", "sublayers_per_block": 1}),
    "postnorm": Arm("Post-norm", {**_RESIDUAL, **_POST}, learning_rates=_LOWER_RATES, is_bounded=True),
    "moda_postnorm": Arm(
        "MoDA with post-norm",
        {**_RESIDUAL, **_POST, **_MODA},
        baseline="postnorm",
        learning_rates=_LOWER_RATES,
        is_bounded=True,
    ),
    "moda": Arm("MoDA", {**_RESIDUAL, **_MODA}),
    "static_mix": Arm("Block AttnRes with static weights", {**_BLOCK, "static_mix": True}),
    "block_attn_res_moda": Arm("Block AttnRes and MoDA", {**_BLOCK, **_MODA}),
    SCALED: Arm("scaled PreNorm", _RESIDUAL, has_scaled_outputs=True),
    "block_attn_res_scaled": Arm("scaled Block AttnRes", _BLOCK, **_AS_SCALED),
    "full_attn_res_scaled": Arm(
        "scaled Full AttnRes", {"connection": "attn_res", "sublayers_per_block": 1}, **_AS_SCALED
    ),
    "moda_scaled": Arm("scaled MoDA", {**_RESIDUAL, **_MODA}, **_AS_SCALED),
    "static_mix_scaled": Arm("scaled Block AttnRes with static weights", {**_BLOCK, "static_mix": True}, **_AS_SCALED),
    "block_attn_res_moda_scaled": Arm("scaled Block AttnRes and MoDA", {**_BLOCK, **_MODA}, **_AS_SCALED),
    "layer_norm_scaling": Arm("LayerNorm scaling", {"connection": "layer_norm_scaling"}, is_bounded=True),
    "rezero": Arm("ReZero", {"connection": "rezero"}, is_bounded=True),
    "dense_former": Arm("scaled DenseFormer", {"connection": "dense_former"}, **_AS_SCALED),
    "hyper_connections": Arm(
        "scaled Hyper-Connections", {**_STREAMS, "connection": "hyper_connections"}, **_AS_SCALED
    ),
    "mhc": Arm("scaled mHC", {**_STREAMS, "connection": "mhc"}, **_AS_SCALED),
    CONTINUED: Arm(
        "continued PreNorm",
        _RESIDUAL,
        baseline=CONTINUED,
        start=SCALED,
        learning_rates=(1e-3, 2e-3, 4e-3),
    ),
    "retrofit_block_attn_res": Arm(
        "retrofitted Block AttnRes",
        _BLOCK_AS_HOST,
        baseline=CONTINUED,
        start=SCALED,
        depth_lr_factors=_FACTORS,
    ),
    "retrofit_moda": Arm(
        "retrofitted gated MoDA",
        {**_RESIDUAL, **_GATED_MODA},
        baseline=CONTINUED,
        start=SCALED,
        depth_lr_factors=_FACTORS,
    ),
    "retrofit_both": Arm(
        "retrofitted Block AttnRes and MoDA",
        {**_BLOCK_AS_HOST, **_GATED_MODA},
        baseline=CONTINUED,
        start=SCALED,
        depth_lr_factors=_FACTORS,
    ),
}
