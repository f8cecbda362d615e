"""Tile sizes of Block AttnRes' two phases, by kernel, reads and channels: looked up, not searched for."""

from __future__ import annotations

from typing import NamedTuple

from .attn_res_configs import TileConfig, WarpRow, tile_config

#: Reads whose mixes a program keeps in registers; a block of more takes several launches.
MAX_READS_PER_LAUNCH = 16


class Phase1Config(NamedTuple):
    """How a program of a kernel of phase 1 is laid out.

    Attributes:
        block_t: tokens of a program, or of one step of it.
        block_d: channels of one step, a power of two.
        num_warps: warps of a program.
        programs_per_sm: resident programs per multiprocessor, for the gradients; their grid does not depend on tokens.
        min_reads: reads are padded to a power of two, at least this.
    """

    block_t: int
    block_d: int
    num_warps: int
    programs_per_sm: int = 1
    min_reads: int = 1

    def launch_options(self, num_channels: int, num_reads: int) -> dict:
        """Compile-time arguments of a launch."""
        return {
            "S": num_reads,
            "SP": max(self.min_reads, 1 << (num_reads - 1).bit_length()),
            "D": num_channels,
            "BLOCK_T": self.block_t,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
            # Triton 3.10 no longer fuses multiplications and additions unless asked to.
            "enable_fp_fusion": True,
        }


#: Kernel -> most reads of a launch -> layout. Chosen so that nothing spills (tests/kernels); not
#: timed yet. Mixes, products and gradients of all reads are in registers together: about 64 elements per thread.
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
    """Looks up the tiles of a launch.

    Args:
        kernel: `"logits"`, `"mix"`, `"dots"` or `"grads"`.
        num_reads: S of this launch, up to `MAX_READS_PER_LAUNCH`.
    """
    for most_reads, config in PHASE1_CONFIGS[kernel].items():
        if num_reads <= most_reads:
            return config
    raise ValueError(f"num_reads must be at most {MAX_READS_PER_LAUNCH}, got {num_reads}")


#: Kernel of phase 2 -> rows, of which the first that fits is taken.
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
# As in `attn_res_configs`.
_ELEMENTS_PER_WARP = {"phase2": 1024, "phase2_backward": 512}
_MAX_PADDING = {"phase2": 1 / 8, "phase2_backward": 1 / 6}


def phase2_config(kernel: str, num_channels: int) -> TileConfig:
    """Looks up the tiles of a launch of phase 2.

    Args:
        kernel: `"phase2"` or `"phase2_backward"`.
        num_channels: D, up to `MAX_CHANNELS`.
    """
    config = tile_config(PHASE2_WARPS[kernel], num_channels, 2, _ELEMENTS_PER_WARP[kernel], _MAX_PADDING[kernel])
    if config is None:
        raise ValueError(f"no tile sizes for {num_channels} channels in {kernel}")
    return config
