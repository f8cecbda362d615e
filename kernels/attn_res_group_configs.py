"""Tables of tile sizes of grouped AttnRes reads, by kernel, reads and channels."""

from __future__ import annotations

from typing import NamedTuple

from .attn_res_configs import MAX_CHANNELS, TileConfig, WarpRow, tile_config

#: Maximum number of reads per launch of phase 1, whose results a program keeps in registers; more reads need several.
MAX_READS_PER_LAUNCH = 16


class Phase1Config(NamedTuple):
    """Tile sizes and launch options of a program of phase 1.

    Attributes:
        block_t: tokens per program, or per iteration.
        block_d: channels per iteration, a power of two, of 16-bit sources; half as many of 32-bit sources.
        num_warps: warps per program.
        num_reads: reads are padded to this number. Times the tokens per program, it is at least 16 (`tl.dot`).
        programs_per_sm: resident programs per multiprocessor, for the kernel whose grid does not depend on tokens.
        group: number of sources loaded together, or 0 for a kernel that loads one at a time.
        max_registers: maximum number of registers per thread, see `TileConfig`.
    """

    block_t: int
    block_d: int
    num_warps: int
    num_reads: int
    programs_per_sm: int = 1
    group: int = 0
    max_registers: int = 255

    def launch_options(self, num_channels: int, num_reads: int, element_bytes: int) -> dict:
        """Return the compile-time arguments of a launch."""
        block_d = self.block_d if element_bytes <= 2 else self.block_d // 2
        options = {
            "S": num_reads,
            "SP": self.num_reads,
            "D": num_channels,
            "BLOCK_T": self.block_t,
            "BLOCK_D": max(_MIN_BLOCK_D, min(block_d, 1 << (num_channels - 1).bit_length())),
            "num_warps": self.num_warps,
            # From Triton 3.10 on, multiplications and additions are not fused by default.
            "enable_fp_fusion": True,
            "maxnreg": self.max_registers,
        }
        return options | {"GROUP": self.group} if self.group else options


# `tl.dot` sums over at least 16 channels.
_MIN_BLOCK_D = 16

#: Kernel -> (maximum number of reads, of channels) -> tile sizes; the first that fit are used. Chosen so that no
#: registers are spilled (tests/kernels), not tuned on a GPU. Programs have few tokens, so that the matrices of all
#: resident programs are in L2 cache together: with 9 sources, 8 reads and 4096 channels, a token has 140 KB.
PHASE1_CONFIGS: dict[str, dict[tuple[int, int], Phase1Config]] = {
    "forward": {
        (8, 2048): Phase1Config(2, 128, 4, num_reads=8, group=8),
        (16, MAX_CHANNELS): Phase1Config(1, 128, 4, num_reads=16, group=16),
    },
    "sources": {
        (8, 2048): Phase1Config(2, 128, 4, num_reads=8, group=8),
        (16, MAX_CHANNELS): Phase1Config(1, 128, 4, num_reads=16, group=16),
    },
    "weights": {(16, MAX_CHANNELS): Phase1Config(64, 128, 4, num_reads=16, programs_per_sm=2)},
}


def phase1_config(kernel: str, num_reads: int, num_channels: int) -> Phase1Config:
    """Look up the tile sizes of a launch of phase 1.

    Args:
        kernel: `"forward"`, `"sources"` or `"weights"`.
        num_reads: number of reads S of the launch, up to `MAX_READS_PER_LAUNCH`.
        num_channels: D, up to `MAX_CHANNELS`.

    Raises:
        ValueError: if there are more reads or channels.
    """
    for (most_reads, most_channels), config in PHASE1_CONFIGS[kernel].items():
        if num_reads <= most_reads and num_channels <= most_channels:
            return config
    raise ValueError(f"no tile sizes for {num_reads} reads and {num_channels} channels in phase 1")


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
    """Look up the tile sizes of a launch of phase 2 of one source.

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
