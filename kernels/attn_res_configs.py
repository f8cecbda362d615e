"""Tables of tile sizes of the AttnRes read, by direction, architecture, channels and sources.

There is no autotuning, because it would delay the first call of every shape and cannot run during CUDA graph capture.
The rows of `"default"` were not tuned on a GPU but chosen from compiled kernels: registers suffice for 32 channels per
thread in the forward and 16 in the backward (32 in programs of 8 warps).
"""

from __future__ import annotations

from typing import NamedTuple

#: Maximum number of sources per launch, see `most_sources`; more sources need several launches. Each number is
#: compiled separately.
MAX_SOURCES_PER_LAUNCH = 16
#: Maximum number of channels, since one program keeps the row of a token in registers.
MAX_CHANNELS = 8192

_MAX_TOKENS_PER_PROGRAM = 16
_MIN_CHUNK, _MAX_CHUNK = 128, 4096
# Padding costs instructions, so a row is split into chunks until padding is at most this share of it. Compile time
# grows faster than the number of chunks, most in the backward, which therefore pads 7168.
_MAX_PADDING = {"forward": 1 / 8, "joined": 1 / 8, "backward": 1 / 6}


class TileConfig(NamedTuple):
    """Tile sizes and launch options of a program of the read.

    Attributes:
        block_t: tokens per program (per iteration in the backward).
        block_d: channels per chunk of a row, a power of two.
        num_warps: warps per program.
        programs_per_sm: resident programs per multiprocessor, for the backward, whose grid does not depend on tokens.
        max_registers: maximum number of registers per thread. Without it, some versions of the assembler spill
            instead of using more than 40.
    """

    block_t: int
    block_d: int
    num_warps: int
    programs_per_sm: int = 1
    max_registers: int | None = None

    def launch_options(self, num_channels: int) -> dict:
        """Return the compile-time arguments of a launch."""
        options = {
            "D": num_channels,
            "BLOCK_T": self.block_t,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
            # From Triton 3.10 on, multiplications and additions are not fused by default.
            "enable_fp_fusion": True,
        }
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


class WarpRow(NamedTuple):
    """Warps and registers for launches with at most this many channels and sources."""

    max_channels: int
    max_sources: int
    num_warps: int
    programs_per_sm: int = 1
    max_registers: int | None = None


#: (direction, architecture such as "sm_90" or "gfx942") -> rows, of which the first that fits is used. Architectures
#: without rows use those of "default".
WARPS: dict[tuple[str, str], tuple[WarpRow, ...]] = {
    ("forward", "default"): (
        WarpRow(1024, 8, 1),
        WarpRow(2048, 16, 2),
        WarpRow(4096, 16, 4),
        WarpRow(8192, 16, 8),
    ),
    # The forward of a read with a prior or an update, in phase 2 of grouped reads.
    ("joined", "default"): (
        WarpRow(1024, 8, 1),
        WarpRow(2048, 16, 2),
        WarpRow(4096, 8, 4),
        WarpRow(4096, 16, 8),
        WarpRow(8192, 16, 16),
    ),
    ("backward", "default"): (
        WarpRow(512, 16, 1, 12),
        WarpRow(1024, 16, 2, 6),
        WarpRow(2048, 16, 4, 3),
        WarpRow(5120, 16, 8, 2),
        # 16 warps have 128 registers per thread, which do not suffice.
        WarpRow(8192, 16, 8, 1),
    ),
}
# Elements of a tile, over all its tokens, in a program with one warp.
_ELEMENTS_PER_WARP = {"forward": 1024, "joined": 1024, "backward": 512}


def read_config(direction: str, architecture: str, num_channels: int, num_sources: int) -> TileConfig:
    """Look up the tile sizes of a launch.

    Args:
        direction: `"forward"`, `"joined"` or `"backward"`.
        architecture: `"sm_90"`, `"gfx942"`, ...
        num_channels: D, up to `MAX_CHANNELS`.
        num_sources: number of sources of the launch, up to `MAX_SOURCES_PER_LAUNCH`.

    Raises:
        ValueError: if there are more channels or sources.
    """
    rows = WARPS.get((direction, architecture), WARPS[direction, "default"])
    config = tile_config(rows, num_channels, num_sources, _ELEMENTS_PER_WARP[direction], _MAX_PADDING[direction])
    if config is None:
        raise ValueError(
            f"no tile sizes for {num_channels} channels and {num_sources} sources in the {direction} pass"
        )
    return config


def most_sources(num_channels: int, is_complex: bool) -> int:
    """Return the maximum number of sources per launch.

    Args:
        num_channels: D.
        is_complex: whether the forward has an update, or the backward a prior, gradients from later uses or several
            launches. Beside them, registers do not hold the addresses of as many sources.
    """
    return MAX_SOURCES_PER_LAUNCH // 2 if is_complex and num_channels > 5120 else MAX_SOURCES_PER_LAUNCH


def tile_config(
    rows: tuple[WarpRow, ...], num_channels: int, num_sources: int, elements_per_warp: int, max_padding: float
) -> TileConfig | None:
    """Return the tile sizes of a launch from the first row that fits, or `None` if none does.

    Args:
        rows: the rows, in order.
        num_channels: D.
        num_sources: number of sources of the launch.
        elements_per_warp: elements of a tile, over all its tokens, in a program with one warp.
        max_padding: maximum share of padding in a row.
    """
    # Rows that are not aligned to 16 bytes are loaded one element per register.
    alignment = 1 if num_channels % 8 == 0 else 4
    looked_up = min(num_channels * alignment, MAX_CHANNELS)
    fitting = [row for row in rows if looked_up <= row.max_channels and num_sources <= row.max_sources]
    if not fitting:
        return None
    # A program processes several tokens with few channels, so that threads have as much work as with many channels.
    block_t = elements_per_warp // (alignment * _next_power_of_2(num_channels))
    block_t = max(1, min(_MAX_TOKENS_PER_PROGRAM, block_t))
    row = fitting[0]
    return TileConfig(
        block_t, chunk_size(num_channels, max_padding), row.num_warps, row.programs_per_sm, row.max_registers
    )


class DecodeConfig(NamedTuple):
    """Tile sizes of a program of the read for a few tokens.

    Attributes:
        group: number of sources loaded together.
        block_d: channels per chunk of a row, a power of two.
        num_warps: warps per program.
    """

    group: int
    block_d: int
    num_warps: int

    def launch_options(self, num_channels: int) -> dict:
        """Return the compile-time arguments of a launch."""
        return {
            "GROUP": self.group,
            "D": num_channels,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
            "enable_fp_fusion": True,
        }


def decode_config(num_channels: int) -> DecodeConfig:
    """Return tile sizes with eight channels per thread, up to 16 warps, and as many sources as fit in registers."""
    num_warps = max(1, min(16, _next_power_of_2(num_channels) // 256))
    group = 8 if num_channels <= 4096 else 2
    return DecodeConfig(group, chunk_size(num_channels, _MAX_PADDING["forward"]), num_warps)


def chunk_size(num_channels: int, max_padding: float) -> int:
    """Return the largest power of two with at most this share of padding in a row, or else the one with the least."""
    candidates = [min(_next_power_of_2(num_channels), _MAX_CHUNK)]
    while candidates[-1] > _MIN_CHUNK:
        candidates.append(candidates[-1] // 2)
    padding = [-(-num_channels // size) * size / num_channels - 1 for size in candidates]
    for size, padded in zip(candidates, padding, strict=True):
        if padded <= max_padding:
            return size
    return candidates[padding.index(min(padding))]


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
