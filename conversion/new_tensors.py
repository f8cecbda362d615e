"""Tensors of a new checkpoint that are put together from tensors of another one, and written as a stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint_files import (
    CHUNK_BYTES,
    SINGLE_FILE,
    Shard,
    TensorEntry,
    WeightFiles,
    read_chunks,
    shard_name,
    write_index,
    write_shard,
)
from ..utils.progress import progress_bar
from .depth_shards import DTYPES, MAX_SHARD_BYTES, tensor_bytes

#: Number of bytes per element of the dtypes of weights, by their names in safetensors.
ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """Consecutive values of a new tensor: rows of a tensor of the source, or a constant.

    Attributes:
        source: the tensor of the source; `None` for a constant.
        first_row: index of its first row along the first axis.
        num_rows: number of its rows; `None`: all that follow.
        factors: a factor on all values, or float64 `[num_rows]`, one per row; `None` keeps the values as they are.
        constant: the value, without a source.
        num_values: number of values, without a source.
    """

    source: str | None = None
    first_row: int = 0
    num_rows: int | None = None
    factors: float | Tensor | None = None
    constant: float = 0.0
    num_values: int = 0


@dataclass(frozen=True)
class NewTensor:
    """A tensor of the new checkpoint.

    Attributes:
        dtype: its dtype, by its name in safetensors.
        shape: its shape.
        pieces: its values in order.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def sources(self) -> list[str]:
        """Names of the tensors of the source that it is made of, in the order of their values."""
        return list(dict.fromkeys(piece.source for piece in self.pieces if piece.source is not None))

    @property
    def entry(self) -> TensorEntry:
        """Its entry in a header, with offsets from its own start."""
        return TensorEntry(self.dtype, self.shape, 0, self.num_bytes)


def row_values(shape: tuple[int, ...]) -> int:
    """Return the number of values in a row along the first axis."""
    return math.prod(shape[1:])


def write_new_tensors(
    folder: Path, weights: WeightFiles, tensors: Mapping[str, NewTensor], *, progress: bool | None
) -> int:
    """Write the weights of a new checkpoint in shards, with a few megabytes of them in memory.

    Args:
        folder: the folder to write into.
        weights: the weight files of the source.
        tensors: the new tensors by name.
        progress: as in `progress_bar`.

    Returns:
        The number of bytes written.
    """
    shards = _in_shards(tensors)
    names = [shard_name(i, len(shards)) for i in range(1, len(shards) + 1)] if len(shards) > 1 else [SINGLE_FILE]
    shard_of = {shard.path.name: shard for shard in weights.shards}
    written = 0
    with progress_bar(sum(each.num_bytes for each in tensors.values()), "weights", progress, unit="B") as bar:
        for file, shard in zip(names, shards, strict=True):
            layout = {name: (each.dtype, each.shape, each.num_bytes) for name, each in shard.items()}
            written += write_shard(folder / file, layout, _counted(_data(weights, shard_of, shard), bar))
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_index(folder, weight_map, [each.entry for each in tensors.values()])
    return written


def _in_shards(tensors: Mapping[str, NewTensor]) -> list[dict[str, NewTensor]]:
    shards: list[dict[str, NewTensor]] = [{}]
    shard_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and shard_bytes + tensor.num_bytes > MAX_SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += tensor.num_bytes
    return shards


def _counted(chunks: Iterator[memoryview], bar: Any) -> Iterator[memoryview]:
    for chunk in chunks:
        yield chunk
        bar.update(len(chunk))


def _data(
    weights: WeightFiles, shard_of: Mapping[str, Shard], tensors: Mapping[str, NewTensor]
) -> Iterator[memoryview]:
    for tensor in tensors.values():
        for piece in tensor.pieces:
            if piece.source is None:
                yield tensor_bytes(torch.full((piece.num_values,), piece.constant, dtype=DTYPES[tensor.dtype]))
            else:
                yield from _rows(shard_of[weights.weight_map[piece.source]], piece, DTYPES[tensor.dtype])


def _rows(shard: Shard, piece: Piece, dtype: torch.dtype) -> Iterator[memoryview]:
    """Yield the rows of a piece in the dtype of the new tensor."""
    assert piece.source is not None
    entry = shard.tensors[piece.source]
    row = row_values(entry.shape) * ITEM_BYTES[entry.dtype]
    num_rows = entry.shape[0] - piece.first_row if piece.num_rows is None else piece.num_rows
    start = shard.data_start + entry.start + piece.first_row * row
    if piece.factors is None and dtype == DTYPES[entry.dtype]:
        yield from read_chunks(shard.path, start, start + num_rows * row)
        return
    # In whole rows, since factors may differ between them.
    rows_at_once = max(1, CHUNK_BYTES // row)
    for first in range(0, num_rows, rows_at_once):
        last = min(first + rows_at_once, num_rows)
        data = b"".join(read_chunks(shard.path, start + first * row, start + last * row))
        values = torch.frombuffer(bytearray(data), dtype=DTYPES[entry.dtype]).view(last - first, -1)
        if isinstance(piece.factors, Tensor):
            values = values.double() * piece.factors[first:last, None]
        elif piece.factors is not None:
            values = values.double() * piece.factors
        yield tensor_bytes(values.to(dtype))
