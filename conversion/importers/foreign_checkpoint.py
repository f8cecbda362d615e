"""A checkpoint of another project, and what it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from transformers import PreTrainedConfig

from ...checkpoints.checkpoint_files import TensorEntry, WeightFiles, read_json, read_weight_files
from ...checkpoints.config_check import check_counts
from ...checkpoints.foreign_tensors import OF_AN_ADAPTER, PACKED, check_not_quantised
from ...errors import UserError
from ..depth_shards import DTYPES
from ..new_tensors import NewTensor

_UNQUANTISED = "Import the unquantised checkpoint and quantise the result."


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another project.

    Attributes:
        folder: its folder.
        config: its config.json.
        weights: its weight files.
    """

    folder: Path
    config: dict[str, Any]
    weights: WeightFiles

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """Its tensors by name."""
        return dict(self.weights.entries())

    def scalar(self, name: str) -> float:
        """Return the value of a tensor with one element.

        Args:
            name: the tensor.

        Raises:
            UserError: if it has more elements.
        """
        with safe_open(self.folder / self.weights.weight_map[name], framework="pt") as file:
            value = file.get_tensor(name)
        if value.numel() != 1:
            raise UserError(f"{self.folder}: tensor {name!r} has the shape {list(value.shape)}, not one element.")
        return float(value)


def read_foreign_checkpoint(folder: Path) -> ForeignCheckpoint:
    """Read config and headers of a checkpoint of another project.

    Args:
        folder: the checkpoint.

    Raises:
        UserError: if a file is missing or damaged.
    """
    config = read_json(folder / "config.json")
    check_counts(str(folder), config)
    return ForeignCheckpoint(folder, config, read_weight_files(folder))


def check_weights_are_plain(foreign: ForeignCheckpoint) -> None:
    """Check that the weights of a checkpoint are numbers of a model.

    Args:
        foreign: a checkpoint of a format that can be imported.

    Raises:
        UserError: if they are quantised, packed or of an adapter.
    """
    folder = foreign.folder
    check_not_quantised(folder, foreign.config, _UNQUANTISED)
    for name, entry in foreign.entries.items():
        if OF_AN_ADAPTER.search(name):
            raise UserError(f"{folder}: tensor {name!r} belongs to an adapter that was not merged; merge it first.")
        if entry.dtype not in DTYPES or PACKED.search(name):
            raise UserError(
                f"{folder}: tensor {name!r} has the dtype {entry.dtype} or a name of packed weights (importable are "
                f"{', '.join(DTYPES)}). {_UNQUANTISED}"
            )


@dataclass(frozen=True)
class ImportPlan:
    """What a checkpoint becomes.

    Attributes:
        host: config of the host.
        options: options of `DepthAttnConfig`.
        tensors: the new tensors by name.
        dropped: tensors of the source that the new checkpoint does not need, with the reason.
        notes: what the user should know about the result.
        tokenizer: name of the tokenizer, if the config has it.
    """

    host: PreTrainedConfig
    options: dict[str, Any]
    tensors: Mapping[str, NewTensor]
    dropped: Mapping[str, str]
    notes: tuple[str, ...] = ()
    tokenizer: str | None = None


class Importer(Protocol):
    """A module of this package that imports one format.

    Attributes:
        NAME: name of the format, for `--format`.
        PROJECT: the project, for messages and model cards.
    """

    NAME: str
    PROJECT: str

    def recognises(self, foreign: ForeignCheckpoint) -> bool:
        """Return whether the checkpoint is of this format or of one of its variants, importable or not."""

    def plan(self, foreign: ForeignCheckpoint) -> ImportPlan:
        """Return what the checkpoint becomes.

        Raises:
            UserError: if it has something that this package cannot express; the message names it.
        """
