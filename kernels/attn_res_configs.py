"""Tile sizes of the AttnRes read, by direction, architecture, channels and sources: looked up, not searched for.

A search at the first call of every shape would stall it, and cannot run while a CUDA graph is captured. The rows of
`"default"` come from compiled kernels, not from a GPU: 32 channels per thread in the forward and 16 in the backward
are what fits in registers with up to 16 sources.
"""

from __future__ import annotations

from typing import NamedTuple

#: Sources a single launch takes. Every number up to it is a kernel of its own; more sources take several launches.
MAX_SOURCES_PER_LAUNCH = 16
#: A row of a token stays in the registers of one program.
MAX_CHANNELS = 8192

_MAX_TOKENS_PER_PROGRAM = 16
_MIN_CHUNK, _MAX_CHUNK = 128, 4096
# Channels past the end of a row cost instructions: a row is cut into chunks until they are at most this share of it.
# Chunks cost time in the compiler, which grows faster than their number; most in the backward, where 7168 is padded.
_MAX_PADDING = {"forward": 1 / 8, "backward": 1 / 6}


class TileConfig(NamedTuple):
    """How a program of the read is laid out.

    Attributes:
        block_t: tokens of a program (of one step of it, in the backward).
        block_d: channels of a chunk of the row, a power of two.
        num_warps: warps of a program.
        programs_per_sm: resident programs per multiprocessor, for the backward; its grid does not depend on tokens.
        max_registers: what a thread may have. Left to itself, the assembler of some versions spills rather than go
            beyond 40 of them.
    """

    block_t: int
    block_d: int
    num_warps: int
    programs_per_sm: int = 1
    max_registers: int | None = None

    def launch_options(self, num_channels: int) -> dict:
        """Compile-time arguments of a launch."""
        options = {
            "D": num_channels,
            "BLOCK_T": self.block_t,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
            # Triton 3.10 no longer fuses multiplications and additions unless asked to.
            "enable_fp_fusion": True,
        }
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


class WarpRow(NamedTuple):
    """Launches with at most this many channels and sources run with these warps."""

    max_channels: int
    max_sources: int
    num_warps: int
    programs_per_sm: int = 1
    max_registers: int | None = None


#: (direction, architecture) -> rows, of which the first that fits is taken. Architectures are "sm_90" or "gfx942"; one
#: without rows of its own takes those of "default".
WARPS: dict[tuple[str, str], tuple[WarpRow, ...]] = {
    ("forward", "default"): (
        WarpRow(1024, 8, 1),
        WarpRow(2048, 16, 2),
        WarpRow(4096, 16, 4),
        WarpRow(8192, 16, 8),
    ),
    ("backward", "default"): (
        WarpRow(512, 16, 1, 12),
        WarpRow(1024, 16, 2, 6),
        WarpRow(2048, 16, 4, 3),
        WarpRow(5120, 16, 8, 2),
        WarpRow(8192, 16, 16, 1),
    ),
}
# Elements of a tile, over all its tokens, in a program of one warp.
_ELEMENTS_PER_WARP = {"forward": 1024, "backward": 512}


def read_config(direction: str, architecture: str, num_channels: int, num_sources: int) -> TileConfig:
    """Looks up the tiles of a launch.

    Args:
        direction: `"forward"` or `"backward"`.
        architecture: `"sm_90"`, `"gfx942"`, ...
        num_channels: D, up to `MAX_CHANNELS`.
        num_sources: sources of this launch, up to `MAX_SOURCES_PER_LAUNCH`.
    """
    rows = WARPS.get((direction, architecture), WARPS[direction, "default"])
    config = tile_config(rows, num_channels, num_sources, _ELEMENTS_PER_WARP[direction], _MAX_PADDING[direction])
    if config is None:
        raise ValueError(
            f"no tile sizes for {num_channels} channels and {num_sources} sources in the {direction} pass"
        )
    return config


def tile_config(
    rows: tuple[WarpRow, ...], num_channels: int, num_sources: int, elements_per_warp: int, max_padding: float
) -> TileConfig | None:
    """The tiles of a launch by the first row that fits; `None` if none does.

    Args:
        rows: in the order in which they are tried.
        num_channels: D.
        num_sources: sources of this launch.
        elements_per_warp: elements of a tile, over all its tokens, in a program of one warp.
        max_padding: share of a row that may be padding.
    """
    # Rows that are not aligned to 16 bytes are loaded one element per register.
    alignment = 1 if num_channels % 8 == 0 else 4
    looked_up = min(num_channels * alignment, MAX_CHANNELS)
    fitting = [row for row in rows if looked_up <= row.max_channels and num_sources <= row.max_sources]
    if not fitting:
        return None
    # Narrow rows share a program, until its threads have as much to do as with a wide one.
    block_t = elements_per_warp // (alignment * _next_power_of_2(num_channels))
    block_t = max(1, min(_MAX_TOKENS_PER_PROGRAM, block_t))
    row = fitting[0]
    return TileConfig(
        block_t, chunk_size(num_channels, max_padding), row.num_warps, row.programs_per_sm, row.max_registers
    )


class DecodeConfig(NamedTuple):
    """How a program of the read for a few tokens is laid out; attributes as in `TileConfig`.

    Attributes:
        group: sources loaded together.
    """

    group: int
    block_d: int
    num_warps: int

    def launch_options(self, num_channels: int) -> dict:
        """Compile-time arguments of a launch."""
        return {
            "GROUP": self.group,
            "D": num_channels,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
            "enable_fp_fusion": True,
        }


def decode_config(num_channels: int) -> DecodeConfig:
    """Eight channels per thread as far as warps go, and few enough sources at a time for the registers of the rest."""
    num_warps = max(1, min(16, _next_power_of_2(num_channels) // 256))
    group = 8 if num_channels <= 4096 else 2
    return DecodeConfig(group, chunk_size(num_channels, _MAX_PADDING["forward"]), num_warps)


def chunk_size(num_channels: int, max_padding: float) -> int:
    """The largest power of two that pads a row by at most that share; the one that pads least if there is none."""
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
