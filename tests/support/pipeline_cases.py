"""Cases of pipeline parallelism: a model, its split and schedule, and what is done with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

FULL = {"sublayers_per_block": 1}
#: Blocks that end within a stage.
BLOCK = {"sublayers_per_block": 3, "read_scale": "sum"}
WINDOW = {"sublayers_per_block": 1, "depth_window": 2}
MODA = {"connection": "residual", "depth_kv": "attention+mlp"}
BOTH = {**BLOCK, "depth_kv": "attention+mlp", "depth_gate": "head"}
MOE = {"host": "qwen3_moe", "host_fields": {"output_router_logits": True}}
TIED = {"host_fields": {"tie_word_embeddings": True}}

LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
SINGLE = ("GPipe", "1F1B")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


def freeze_first_layers(model: nn.Module) -> None:
    """Freeze the embeddings and the first two layers, as far as a stage has them."""
    frozen = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.", "model.depth_reads.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))


def checkpoint_layers(model: nn.Module) -> None:
    """Enable gradient checkpointing."""
    model.gradient_checkpointing_enable()


def end_groups_with_layers(model: nn.Module) -> None:
    """Let the whole model round as the stages do, in which no group of reads crosses a boundary."""
    model.config.attn_res_schedule = "layer"


@dataclass(frozen=True)
class Case:
    """A model in pipeline stages.

    Attributes:
        schedule: name of the schedule.
        fields: fields of the config.
        host: model type of the host.
        host_fields: fields of its config.
        num_layers: number of decoder layers.
        num_microbatches: number of microbatches, of two sequences each.
        cached: whether ranks keep items for their later stages.
        sizes: number of layers of every stage; even by default.
        dtype: dtype of the model and of the comparison.
        prepare: function of the whole model and of every stage's model.
        padded: whether sequences begin with padding.
        autocast: whether to run under autocast to bfloat16.
        rounding: factor of the tolerance.
        counts_bytes: whether all tensors that are sent have the dtype of the model and get a gradient.
    """

    schedule: str
    fields: dict[str, Any]
    host: str = "llama"
    host_fields: dict[str, Any] = field(default_factory=dict)
    num_layers: int = 4
    num_microbatches: int = 2
    cached: bool = True
    sizes: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    prepare: Callable[[nn.Module], None] | None = None
    padded: bool = False
    autocast: bool = False
    rounding: int = 1
    counts_bytes: bool = True

    @property
    def layers(self) -> list[range] | None:
        """The layers of every stage."""
        if self.sizes is None:
            return None
        starts = [sum(self.sizes[:stage]) for stage in range(len(self.sizes) + 1)]
        return [range(start, stop) for start, stop in pairwise(starts)]


#: Cases of two processes in `make test`: every schedule and every kind of item at least once.
TWO_PROCESSES = {
    "full, GPipe": Case("GPipe", FULL),
    "block, 1F1B, uneven": Case("1F1B", BLOCK, sizes=(1, 3)),
    "full, Interleaved1F1B": Case("Interleaved1F1B", FULL),
    "full, Interleaved1F1B, whole states": Case("Interleaved1F1B", FULL, cached=False),
    "both, LoopedBFS, float32": Case("LoopedBFS", BOTH, dtype=torch.float32),
    "both, InterleavedZeroBubble, checkpointed": Case(
        "InterleavedZeroBubble", BOTH, host="qwen3", prepare=checkpoint_layers
    ),
    "block, ZBVZeroBubble, tied": Case("ZBVZeroBubble", BLOCK, **TIED),
    "3 slots, DualPipeV, padded": Case("DualPipeV", {**BOTH, "num_depth_slots": 3}, padded=True, num_microbatches=4),
    "window, InterleavedZeroBubble": Case("InterleavedZeroBubble", WINDOW),
    "MoDA, Interleaved1F1B, MoE loss": Case("Interleaved1F1B", MODA, **MOE, counts_bytes=False),
    "delta, value residual, LoopedBFS": Case("LoopedBFS", {"connection": "delta", "value_residual": True}),
    "streams, Interleaved1F1B": Case("Interleaved1F1B", {"connection": "mhc"}),
    "frozen, InterleavedZeroBubble": Case(
        "InterleavedZeroBubble", BLOCK, prepare=freeze_first_layers, counts_bytes=False
    ),
    "both, Interleaved1F1B, autocast": Case(
        "Interleaved1F1B", BOTH, dtype=torch.float32, autocast=True, counts_bytes=False
    ),
}

#: What the slow tests run under every schedule.
_KINDS: dict[str, dict[str, Any]] = {
    "full": {"fields": FULL},
    "block": {"fields": BLOCK},
    "window": {"fields": WINDOW},
    "input query": {"fields": {**BLOCK, "query": "input"}},
    "static mix": {"fields": {**BLOCK, "static_mix": True}},
    "MoDA": {"fields": MODA},
    "3 slots": {"fields": {**MODA, "num_depth_slots": 3}},
    "both": {"fields": BOTH},
    "both, float32": {"fields": BOTH, "dtype": torch.float32},
    "MoE loss": {"fields": BOTH, **MOE, "counts_bytes": False},
    "tied": {"fields": BOTH, **TIED},
    "padded": {"fields": BOTH, "padded": True},
    "uneven": {"fields": BOTH, "num_layers": 6},
    "key norm": {"fields": BOTH, "host": "qwen3"},
    "frozen": {"fields": BOTH, "prepare": freeze_first_layers, "counts_bytes": False},
    "checkpointed": {"fields": FULL, "prepare": checkpoint_layers},
    "value residual": {"fields": {"connection": "residual", "value_residual": True}},
    **{name: {"fields": {"connection": name}} for name in ("delta", "dense_former", "x0_lambdas", "mhc", "highway")},
}


def _under(schedule: str, kind: str, cached: bool) -> Case:
    arguments = dict(_KINDS[kind])
    if kind == "uneven":
        arguments["sizes"] = (5, 1) if schedule in SINGLE else (1, 3, 1, 1)
    return Case(schedule, cached=cached, num_microbatches=4, **arguments)


ALL_OF_TWO_PROCESSES = {
    f"{kind}, {schedule}{'' if cached else ', whole states'}": _under(schedule, kind, cached)
    for schedule in (*SINGLE, *LOOPED, *V_SHAPED)
    for kind in _KINDS
    for cached in (True, False)
    # With one stage per rank there is nothing to keep.
    if cached or schedule not in SINGLE
}

FOUR_PROCESSES = {
    f"{kind}, {schedule}": Case(schedule, num_layers=8, num_microbatches=8, **_KINDS[kind])
    for schedule in (*SINGLE, *LOOPED, *V_SHAPED)
    for kind in ("full", "both", "MoE loss")
} | {
    f"{kind}, Interleaved1F1B": Case("Interleaved1F1B", num_layers=8, num_microbatches=4, **_KINDS[kind])
    for kind in ("tied", "3 slots", "delta", "frozen", "window")
}
FOUR_PROCESSES["both, float32, Interleaved1F1B"] = Case(
    "Interleaved1F1B", BOTH, num_layers=8, num_microbatches=4, dtype=torch.float32, prepare=end_groups_with_layers
)
# The groups of the whole model round in another order than those of eight stages; 4.4e-6 was measured.
FOUR_PROCESSES["both, float32, own groups, Interleaved1F1B"] = Case(
    "Interleaved1F1B", BOTH, num_layers=8, num_microbatches=4, dtype=torch.float32, rounding=3
)

#: Two ranks of the pipeline, on each two processes that share its stages or have copies of them.
COMPOSED = {
    f"{kind}, {schedule}": Case(schedule, **_KINDS[kind])
    for schedule in ("1F1B", "Interleaved1F1B", "LoopedBFS")
    for kind in ("full", "both", "tied", "checkpointed")
}
