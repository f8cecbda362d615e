"""Write the weights of a checkpoint without some of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from ..checkpoints.checkpoint_files import (
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
from .output_folder import ByteCounts, place_weights


def write_kept_weights(
    folder: Path,
    weights: WeightFiles,
    removed: Collection[str],
    counts: ByteCounts,
    *,
    copy: bool,
    progress: bool | None,
) -> None:
    """Link shards that keep all their tensors, rewrite those that keep some, and omit those that keep none.

    Args:
        folder: the folder to write into.
        weights: the weight files of the source.
        removed: names of the tensors to leave out.
        counts: its counters are increased.
        copy: copy the weights instead of hard-linking them.
        progress: as in `progress_bar`.
    """
    kept_in = {shard.path.name: _kept(shard, removed) for shard in weights.shards}
    shards = [shard for shard in weights.shards if kept_in[shard.path.name]]
    # A single file needs no index.
    new_names = [shard_name(i, len(shards)) for i in range(1, len(shards) + 1)] if len(shards) > 1 else [SINGLE_FILE]
    weight_map: dict[str, str] = {}
    total = sum(shard.num_bytes for shard in shards)
    with progress_bar(total, "weights", progress, unit="B") as bar:
        for shard, name in zip(shards, new_names, strict=True):
            kept = kept_in[shard.path.name]
            if len(kept) == len(shard.tensors):
                place_weights(shard.path, folder / name, counts, copy=copy, on_bytes=bar.update)
            else:
                layout = {
                    tensor: (entry.dtype, entry.shape, entry.end - entry.start) for tensor, entry in kept.items()
                }
                counts.written += write_shard(folder / name, layout, _data(shard, kept))
                bar.update(shard.num_bytes)
            weight_map |= dict.fromkeys(kept, name)
    if len(shards) > 1:
        write_index(folder, weight_map, [entry for kept in kept_in.values() for entry in kept.values()])


def _kept(shard: Shard, removed: Collection[str]) -> dict[str, TensorEntry]:
    """Return the tensors of a shard that are kept, in the order of their data."""
    kept = [(name, entry) for name, entry in shard.tensors.items() if name not in removed]
    return dict(sorted(kept, key=lambda item: item[1].start))


def _data(shard: Shard, kept: dict[str, TensorEntry]) -> Iterator[memoryview]:
    for entry in kept.values():
        yield from read_chunks(shard.path, shard.data_start + entry.start, shard.data_start + entry.end)
