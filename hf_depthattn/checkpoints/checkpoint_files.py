"""Read and write safetensors checkpoints as files: headers, indices and shards, without loading tensors.

A safetensors file consists of 8 bytes (length of the header, little endian), the header (JSON: name -> dtype, shape,
offsets) and the data. Everything here works on headers and byte ranges, and needs a few megabytes of memory for a
checkpoint of any size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Names of pickle files with weights; other pickle files are optimizer states and the like.
_PICKLE_PATTERNS = ("pytorch_model*.bin", "model*.pt", "consolidated*.pt*", "*.ckpt")

#: Number of bytes that are read or written at once.
CHUNK_BYTES = 8 * 2**20

# The limit of the safetensors library; a file with a longer header is not a safetensors file.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header: its dtype, its shape, and its byte range in the data part of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """The header of a safetensors file, whose length has been checked."""

    path: Path
    data_start: int
    num_bytes: int
    tensors: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a checkpoint folder.

    Attributes:
        shards: the files, sorted by name.
        weight_map: tensor name -> file name, as in an index.
    """

    shards: tuple[Shard, ...]
    weight_map: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Total size of the files in bytes."""
        return sum(shard.num_bytes for shard in self.shards)

    def entries(self) -> Iterator[tuple[str, TensorEntry]]:
        """Yield name and entry of every tensor in `weight_map`."""
        for shard in self.shards:
            for name, entry in shard.tensors.items():
                if self.weight_map.get(name) == shard.path.name:
                    yield name, entry


def read_shard(path: Path) -> Shard:
    """Read the header of a safetensors file and check the length of the file.

    Args:
        path: the file.

    Raises:
        UserError: if it is not a safetensors file, or is truncated or damaged.
    """
    num_bytes = path.stat().st_size
    with open(path, "rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if num_bytes < 8 or header_length > _MAX_HEADER_BYTES:
            raise UserError(f"{path}: not a safetensors file ({num_bytes} bytes); download or save it again.")
        header_text = file.read(header_length)
    if len(header_text) < header_length:
        raise UserError(f"{path}: cut short inside its header ({num_bytes} bytes); download or save it again.")
    try:
        header = json.loads(header_text)
        header.pop("__metadata__", None)
        tensors = {
            name: TensorEntry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its header is not a safetensors header; download or save it again.") from error
    data_start = 8 + header_length
    ends = [entry.end for entry in tensors.values()]
    if not all(isinstance(end, int) for end in ends):
        raise UserError(f"{path}: its header has offsets that are not numbers; download or save it again.")
    expected = data_start + max(ends, default=0)
    if num_bytes != expected:
        problem = "cut short" if num_bytes < expected else "too long"
        raise UserError(f"{path}: {problem}: {num_bytes} bytes instead of {expected}; download or save it again.")
    try:
        # The check of the library, for dtypes and for shapes that match the offsets; it reads the header only.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        problem = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{path}: its header is damaged ({problem}); download or save it again.") from error
    return Shard(path, data_start, num_bytes, tensors)


def read_weight_files(folder: Path) -> WeightFiles:
    """Find the weight files of a checkpoint folder in the same way as transformers, and check them.

    Args:
        folder: the checkpoint.

    Raises:
        UserError: if there are no safetensors weights, a shard is missing or damaged, or the index does not match its
            shards.
    """
    if (folder / SINGLE_FILE).is_file():
        shard = read_shard(folder / SINGLE_FILE)
        return WeightFiles((shard,), dict.fromkeys(shard.tensors, SINGLE_FILE))
    if not (folder / INDEX_FILE).is_file():
        raise UserError(_no_weights(folder))
    weight_map = read_weight_map(folder / INDEX_FILE)
    shards = []
    for name in sorted(set(weight_map.values())):
        path = folder / name
        if not path.is_file():
            num_tensors = sum(shard_name == name for shard_name in weight_map.values())
            raise UserError(f"{path}: is missing; {num_tensors} tensors of {INDEX_FILE} are in it.")
        shards.append(read_shard(path))
    tensors_of = {shard.path.name: shard.tensors for shard in shards}
    absent = [tensor for tensor, name in weight_map.items() if tensor not in tensors_of[name]]
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UserError(
            f"{folder / weight_map[absent[0]]}: does not contain tensor {absent[0]!r}{more}, contrary to {INDEX_FILE}."
        )
    return WeightFiles(tuple(shards), weight_map)


def read_weight_map(index_file: Path) -> dict[str, str]:
    """Return the mapping from tensor name to shard name of an index.

    Args:
        index_file: the index.

    Raises:
        UserError: if it is not an index of safetensors shards in the same folder.
    """
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_file}: has no 'weight_map'; download or save it again.")
    for name in weight_map.values():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{index_file}: {name!r} is not the name of a safetensors file in the same folder.")
    return weight_map


def check_index(folder: Path) -> None:
    """Check that transformers can read the index of a checkpoint, if it has one.

    Args:
        folder: the checkpoint.

    Raises:
        UserError: if the index has no `metadata`, which may be empty but must exist.
    """
    index_file = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index_file.is_file():
        return
    if not isinstance(read_json(index_file).get("metadata"), dict):
        raise UserError(f"{index_file}: has no 'metadata', which transformers needs; add \"metadata\": {{}}.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the file.

    Raises:
        UserError: if it is missing, not UTF-8, or not a JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path}: is missing.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}).") from error
    except RecursionError as error:
        raise UserError(f"{path}: is not valid JSON (nested too deeply).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object.")
    return content


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in folder.glob(pattern))
    found = f"only pickle weights ({pickles[0]})" if pickles else f"no {SINGLE_FILE} and no {INDEX_FILE}"
    return (
        f"{folder}: {found}; safetensors weights are needed. Load the checkpoint with transformers, save it with "
        "save_pretrained(), and use that folder."
    )


def shard_name(number: int, total: int) -> str:
    """Return the file name of a shard in transformers' scheme; the first number is 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def write_shard(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], int]], chunks: Iterable[bytes | memoryview]
) -> int:
    """Write a safetensors file from a stream.

    Args:
        path: the file.
        tensors: name -> dtype (its name in safetensors), shape, number of bytes; in the order of the data.
        chunks: the data in that order, as bytes-like objects of any length.

    Returns:
        Size of the file in bytes.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data starts at a multiple of 8, so that it can be mapped into memory.
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in chunks:
            file.write(chunk)
        length = file.tell()
    assert length == 8 + len(text) + end, f"{path}: {length} bytes written, {8 + len(text) + end} announced"
    return length


def read_chunks(path: Path, start: int = 0, end: int | None = None) -> Iterator[memoryview]:
    """Yield a byte range of a file in pieces of a few megabytes; each piece is only valid until the next one.

    Args:
        path: the file.
        start: first byte.
        end: end of the range, exclusive; `None`: the end of the file.
    """
    remaining = (path.stat().st_size if end is None else end) - start
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(remaining, 0))))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while remaining > 0:
            num_read = file.readinto(buffer[: min(remaining, CHUNK_BYTES)])
            if not num_read:
                raise UserError(f"{path}: was truncated by {remaining} bytes while it was read.")
            remaining -= num_read
            yield buffer[:num_read]


def write_index(folder: Path, weight_map: Mapping[str, str], entries: Iterable[TensorEntry]) -> None:
    """Write the index of a sharded checkpoint.

    Args:
        folder: the checkpoint.
        weight_map: tensor name -> file name.
        entries: the tensors, for the total size and number of parameters.
    """
    entries = list(entries)
    metadata = {
        "total_parameters": sum(math.prod(entry.shape) for entry in entries),
        "total_size": sum(entry.end - entry.start for entry in entries),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
