"""Tables of tile sizes of MoDA's depth kernels, by element size and padded head dimension."""

from __future__ import annotations

from typing import NamedTuple


class DepthConfig(NamedTuple):
    """Tile sizes and launch options of a program.

    Attributes:
        num_slots: slots per block, a multiple of 16.
        num_warps: warps per program.
        precision: precision of float32 products: `"ieee"`, or `"tf32x3"` (three tensor-core products, with 21 of 24
            bits of precision), which needs fewer registers.
    """

    num_slots: int
    num_warps: int
    precision: str = "ieee"


#: Maximum number of registers per thread. Without it, the assembler uses 128 or 168 and spills for some group sizes.
MAX_REGISTERS = 255

#: Element size in bytes -> padded head dimension -> tile sizes. No registers are spilled on sm_80, sm_90 and sm_100
#: with Triton 3.6 and 3.9 (tests/kernels); not tuned on a GPU. The float32 backward always spills beyond 128.
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
