"""Tables of tile sizes of Block AttnRes in two phases, by kernel, reads and channels."""

from __future__ import annotations

from typing import NamedTuple

from .attn_res_configs import TileConfig, WarpRow, tile_config

#: Maximum number of reads per launch, whose outputs a program keeps in registers; more reads need several launches.
MAX_READS_PER_LAUNCH = 16


class Phase1Config(NamedTuple):
    """Tile sizes and launch options of a program of phase 1.

    Attributes:
        block_t: tokens per program, or per iteration.
        block_d: channels per iteration, a power of two.
        num_warps: warps per program.
        programs_per_sm: resident programs per multiprocessor, for the gradients; their grid does not depend on tokens.
        min_reads: reads are padded to a power of two of at least this number.
    """

    block_t: int
    block_d: int
    num_warps: int
    programs_per_sm: int = 1
    min_reads: int = 1

    def launch_options(self, num_channels: int, num_reads: int) -> dict:
        """Return the compile-time arguments of a launch."""
        return {
            "S": num_reads,
            "SP": max(self.min_reads, 1 << (num_reads - 1).bit_length()),
            "D": num_channels,
            "BLOCK_T": self.block_t,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
            # From Triton 3.10 on, multiplications and additions are not fused by default.
            "enable_fp_fusion": True,
        }


#: Kernel -> maximum number of reads -> tile sizes. Chosen so that no registers are spilled (tests/kernels), not tuned
#: on a GPU. Outputs, products and gradients of all reads are in registers, about 64 elements per thread.
PHASE1_CONFIGS: dict[str, dict[int, Phase1Config]] = {
    "logits": {16: Phase1Config(32, 64, 2, min_reads=16)},
    "mix": {
        2: Phase1Config(16, 256, 4),
        4: Phase1Config(16, 128, 4),
        8: Phase1Config(16, 64, 4),
        16: Phase1Config(16, 64, 8),
    },
    "dots": {
        2: Phase1Config(16, 256, 4),
        4: Phase1Config(16, 128, 4),
        8: Phase1Config(16, 32, 4),
        16: Phase1Config(16, 32, 8),
    },
    "grads": {
        2: Phase1Config(16, 128, 8, programs_per_sm=1, min_reads=8),
        8: Phase1Config(16, 64, 8, programs_per_sm=1, min_reads=8),
        16: Phase1Config(16, 32, 8, programs_per_sm=1),
    },
}


def phase1_config(kernel: str, num_reads: int) -> Phase1Config:
    """Look up the tile sizes of a launch of phase 1.

    Args:
        kernel: `"logits"`, `"mix"`, `"dots"` or `"grads"`.
        num_reads: number of reads S of the launch, up to `MAX_READS_PER_LAUNCH`.

    Raises:
        ValueError: if there are more reads.
    """
    for most_reads, config in PHASE1_CONFIGS[kernel].items():
        if num_reads <= most_reads:
            return config
    raise ValueError(f"num_reads must be at most {MAX_READS_PER_LAUNCH}, got {num_reads}")


#: Kernel of phase 2 -> rows, of which the first that fits is used.
PHASE2_WARPS: dict[str, tuple[WarpRow, ...]] = {
    "phase2": (
        WarpRow(1024, 16, 2, max_registers=128),
        WarpRow(2048, 16, 4, max_registers=128),
        WarpRow(4096, 16, 8, max_registers=128),
        WarpRow(8192, 16, 16, max_registers=128),
    ),
    "phase2_backward": (
        WarpRow(1024, 16, 2, 6, max_registers=255),
        WarpRow(2048, 16, 4, 3, max_registers=255),
        WarpRow(4096, 16, 8, 2, max_registers=255),
        WarpRow(8192, 16, 16, 1, max_registers=128),
    ),
}
# See `attn_res_configs`.
_ELEMENTS_PER_WARP = {"phase2": 1024, "phase2_backward": 512}
_MAX_PADDING = {"phase2": 1 / 8, "phase2_backward": 1 / 6}


def phase2_config(kernel: str, num_channels: int) -> TileConfig:
    """Look up the tile sizes of a launch of phase 2.

    Args:
        kernel: `"phase2"` or `"phase2_backward"`.
        num_channels: D, up to `MAX_CHANNELS`.

    Raises:
        ValueError: if there are more channels.
    """
    config = tile_config(PHASE2_WARPS[kernel], num_channels, 2, _ELEMENTS_PER_WARP[kernel], _MAX_PADDING[kernel])
    if config is None:
        raise ValueError(f"no tile sizes for {num_channels} channels in {kernel}")
    return config
