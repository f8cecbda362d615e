"""Shared functions of the AttnRes kernels: rows of D channels as tuples of register tiles, and reductions over rows.

A program processes BLOCK_T tokens. Their rows of D channels are split into chunks of BLOCK_D, a power of two, so that
D = 7168, for example, is not padded to 8192. In these files, a "row" is the tuple of its chunks, each
[BLOCK_T, BLOCK_D]. D is a compile-time constant: channels are only masked in the last chunk, if D is not a multiple of
BLOCK_D, and tokens only if BLOCK_T > 1.
"""

from __future__ import annotations

from collections.abc import Callable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)

if triton is not None:
    # The interpreter has no inline assembly, and its reductions of tuples are fifty times slower than two sums.
    _COMPILED = tl.constexpr(not INTERPRETED)


def jit(**options) -> Callable:
    """Return the decorator `triton.jit(**options)`, or the identity without Triton."""
    return triton.jit(**options) if triton is not None else lambda function: function


@jit()
def load_chunk(
    ptr, tokens, in_range, chunk: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load chunk number `chunk` of the rows `tokens` [BLOCK_T] of a matrix [tokens, D].

    Args:
        ptr: pointer to the matrix.
        tokens: row numbers, [BLOCK_T].
        in_range: whether each of them exists, [BLOCK_T].
        chunk: number of the chunk.
        D, BLOCK_T, BLOCK_D: see the docstring of the file.
    """
    columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    # The same 64-bit offset for all matrices, so that base addresses stay in constant memory.
    offsets = tokens[:, None] * D + columns
    if (chunk + 1) * BLOCK_D > D:
        tile = tl.load(ptr + offsets, mask=in_range[:, None] & (columns < D), other=0.0)
    elif BLOCK_T > 1:
        tile = tl.load(ptr + offsets, mask=in_range[:, None], other=0.0)
    else:
        tile = tl.load(ptr + offsets)
    return tile


@jit()
def store_chunk(
    ptr, tile, tokens, in_range, chunk: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store a chunk in a matrix [tokens, D], rounded to its dtype; the inverse of `load_chunk`.

    Args:
        ptr: pointer to the matrix.
        tile: the chunk, [BLOCK_T, BLOCK_D].
        tokens, in_range, chunk, D, BLOCK_T, BLOCK_D: as in `load_chunk`.
    """
    columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    offsets = tokens[:, None] * D + columns
    tile = tile.to(ptr.dtype.element_ty)
    if (chunk + 1) * BLOCK_D > D:
        tl.store(ptr + offsets, tile, mask=in_range[:, None] & (columns < D))
    elif BLOCK_T > 1:
        tl.store(ptr + offsets, tile, mask=in_range[:, None])
    else:
        tl.store(ptr + offsets, tile)


@jit()
def load_vector_chunk(ptr, chunk: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, dtype: tl.constexpr):
    """Load chunk number `chunk` of a vector [D] as [1, BLOCK_D], converted to `dtype`."""
    columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    if (chunk + 1) * BLOCK_D > D:
        tile = tl.load(ptr + columns, mask=columns < D, other=0.0)
    else:
        tile = tl.load(ptr + columns)
    return tile.to(dtype)


@jit()
def load_row(
    ptr, tokens, in_range, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, dtype: tl.constexpr = None
):
    """Load the rows `tokens` [BLOCK_T] of a matrix [tokens, D], converted to `dtype` if given."""
    row = ()
    for chunk in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        tile = load_chunk(ptr, tokens, in_range, chunk, D, BLOCK_T, BLOCK_D)
        if dtype is not None:
            tile = tile.to(dtype)
        row += (tile,)
    return row


@jit()
def store_row(ptr, row, tokens, in_range, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a row in a matrix [tokens, D], rounded to its dtype; the inverse of `load_row`.

    Args:
        ptr: pointer to the matrix.
        row: tuple of the chunks.
        tokens, in_range, D, BLOCK_T, BLOCK_D: as in `load_chunk`.
    """
    for chunk in tl.static_range(len(row)):
        store_chunk(ptr, row[chunk], tokens, in_range, chunk, D, BLOCK_T, BLOCK_D)


@jit()
def load_vector(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, dtype: tl.constexpr):
    """Load a vector [D] as a row of chunks [1, BLOCK_D], converted to `dtype`."""
    row = ()
    for chunk in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        row += (load_vector_chunk(ptr, chunk, D, BLOCK_D, dtype),)
    return row


@jit()
def store_token_sum(ptr, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the sum of a row over its BLOCK_T tokens as a vector [D].

    Args:
        ptr: pointer to the vector.
        row: tuple of the chunks.
        D, BLOCK_D: as in `load_chunk`.
    """
    for k in tl.static_range(len(row)):
        columns = k * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.sum(row[k], 0)
        if (k + 1) * BLOCK_D > D:
            tl.store(ptr + columns, total, mask=columns < D)
        else:
            tl.store(ptr + columns, total)


@jit()
def convert_row(row, dtype: tl.constexpr):
    wide = ()
    for k in tl.static_range(len(row)):
        wide += (row[k].to(dtype),)
    return wide


@jit()
def zero_row(D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, dtype: tl.constexpr):
    row = ()
    for _ in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        row += (tl.zeros([BLOCK_T, BLOCK_D], dtype=dtype),)
    return row


@jit()
def scale_row(row, factor):
    """Return row * factor, with factor [BLOCK_T]."""
    scaled = ()
    for k in tl.static_range(len(row)):
        scaled += (row[k] * factor[:, None],)
    return scaled


@jit()
def add_rows(a, b):
    total = ()
    for k in tl.static_range(len(a)):
        total += (a[k] + b[k],)
    return total


@jit()
def add_scaled(row, other, factor):
    """Return row + other * factor, with factor [BLOCK_T]."""
    total = ()
    for k in tl.static_range(len(row)):
        total += (row[k] + other[k] * factor[:, None],)
    return total


@jit()
def settle(row):
    """Return the row unchanged, but force its computation at this point.

    LLVM moves arithmetic to its first use. The running sum over sources is used after the last source, so all sources
    would stay in registers until then. The assembly is empty, but volatile, so that it is not moved across loads and
    reductions.
    """
    if not _COMPILED:
        return row
    same: tl.constexpr = "=v,0" if tl.target_info.is_hip() else "=f,0"
    settled = ()
    for k in tl.static_range(len(row)):
        settled += (tl.inline_asm_elementwise("", same, [row[k]], dtype=row[k].dtype, is_pure=False, pack=1),)
    return settled


@jit()
def renew(tokens):
    """Return the tokens unchanged, but opaque to the compiler, so that addresses are recomputed instead of kept."""
    if not _COMPILED:
        return tokens
    same: tl.constexpr = "=v,0" if tl.target_info.is_hip() else "=l,0"
    return tl.inline_asm_elementwise("", same, [tokens], dtype=tl.int64, is_pure=False, pack=1)


@jit()
def dot_rows(a, b):
    """Return the sum over channels of a * b, [BLOCK_T]. Chunks are summed before the reduction across threads."""
    products = a[0] * b[0]
    for k in tl.static_range(1, len(a)):
        products += a[k] * b[k]
    return tl.sum(products, 1)


@jit()
def _add_pairs(a, b, c, d):
    return a + c, b + d


@jit()
def square_and_dot(row, weight):
    """Return the sums over channels of row * row and row * weight, each [BLOCK_T], in one reduction across threads."""
    squares = row[0] * row[0]
    products = row[0] * weight[0]
    for k in tl.static_range(1, len(row)):
        squares += row[k] * row[k]
        products += row[k] * weight[k]
    if _COMPILED:
        square, dot = tl.reduce((squares, products), 1, _add_pairs)
    else:
        square = tl.sum(squares, 1)
        dot = tl.sum(products, 1)
    return square, dot
