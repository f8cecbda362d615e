"""Layouts of MoDA's depth kernels, by size of an element and padded head dimension: looked up, not searched for."""

from __future__ import annotations

from typing import NamedTuple


class DepthConfig(NamedTuple):
    """How a program of a kernel is laid out.

    Attributes:
        num_slots: slots in a block, a multiple of 16.
        num_warps: warps of a program.
        precision: of float32 products: `"ieee"` on ordinary cores, or three tensor-core products, `"tf32x3"`, which
            keep 21 bits of the 24 and need fewer registers.
    """

    num_slots: int
    num_warps: int
    precision: str = "ieee"


#: What a thread may have. Left to itself, the assembler aims at 128 or 168 and spills the rest for some group sizes.
MAX_REGISTERS = 255

#: Bytes of an element -> padded head dimension -> layout. No register spills on sm_80, sm_90 and sm_100 with Triton
#: 3.6 and 3.9 (tests/kernels); not timed yet. Beyond 128 the float32 backward spills in every layout.
FORWARD_CONFIGS = {
    2: {
        16: DepthConfig(16, 2),
        32: DepthConfig(16, 2),
        64: DepthConfig(16, 1),
        128: DepthConfig(16, 2),
        256: DepthConfig(16, 2),
    },
    4: {
        16: DepthConfig(16, 4),
        32: DepthConfig(16, 4),
        64: DepthConfig(16, 4),
        128: DepthConfig(16, 8, "tf32x3"),
    },
}
BACKWARD_CONFIGS = {
    2: {
        16: DepthConfig(16, 1),
        32: DepthConfig(16, 1),
        64: DepthConfig(16, 1),
        128: DepthConfig(16, 2),
        256: DepthConfig(16, 8),
    },
    4: {
        16: DepthConfig(16, 4),
        32: DepthConfig(16, 8),
        64: DepthConfig(16, 8),
        128: DepthConfig(16, 8, "tf32x3"),
    },
}
