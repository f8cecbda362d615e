"""Save and load the state of training in pipeline stages with `torch.distributed.checkpoint` (DCP).

Tensors have the names of the whole model, in the format of torch's `get_state_dict` with
`flatten_optimizer_state_dict=True`, so that training can continue with other stages, other schedules, other sizes of
FSDP2 groups or without a pipeline:

    model.<parameter>,  optimizer.state.<parameter>.exp_avg, ...,  optimizer.param_groups.<parameter>.lr, ...

DCP unpickles what is not a tensor: load only checkpoints that you trust.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..utils.paths import user_path
from ..utils.text_table import few
from .common_errors import raise_in_all
from .pipeline import DepthPipeline
from .shared_parameters import model_of

# Keys of the saved state.
_MODEL, _OPTIMIZER, _STEP = "model", "optimizer", "step"
_STATE, _GROUPS = "state", "param_groups"

# What a group has beside options: its parameters, and their names with optimizers of `named_parameters()`.
_PARAMETERS = ("params", "param_names")

# What torch's schedulers of learning rates add to the groups of an optimizer.
_OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum")

Named = list[tuple[str, nn.Parameter]]
#: name of a parameter -> states and options, as (kind, key)
Fields = dict[str, list[tuple[str, str]]]


def save_training_state(
    pipeline: DepthPipeline, optimizer: torch.optim.Optimizer, folder: str | os.PathLike, *, step: int
) -> None:
    """Save parameters, optimizer and the number of steps; all processes call it, and all must see the same folder.

    The folder is complete when it has the file `.metadata`, which is written last.

    Args:
        pipeline: the stages of this rank.
        optimizer: an optimizer of `pipeline.parameters()`; copies of shared parameters have the same options in it.
        folder: the folder, which has no complete state yet.
        step: number of optimizer steps so far.

    Raises:
        UserError: in all processes, if it has one.
    """
    path = user_path(os.fspath(folder))
    raise_in_all(f"{folder}: has a state already; choose another folder." if _is_complete(path) else None)
    saved: dict[str, Any] = {}
    for group, named in _groups(pipeline, optimizer):
        options = {key: value for key, value in group.items() if key not in _PARAMETERS}
        for name, parameter in named:
            state = optimizer.state.get(parameter, {})
            saved |= {f"{_STATE}.{name}.{key}": value for key, value in state.items()}
            saved |= {f"{_GROUPS}.{name}.{key}": value for key, value in options.items()}
    state_dict = {_MODEL: _tensors(pipeline), _OPTIMIZER: saved, _STEP: step}
    dcp.save(state_dict, checkpoint_id=path)


def load_training_state(pipeline: DepthPipeline, optimizer: torch.optim.Optimizer, folder: str | os.PathLike) -> int:
    """Load what `save_training_state` has saved, and return the number of steps; all processes call it.

    Args:
        pipeline: the stages of this rank.
        optimizer: an optimizer of `pipeline.parameters()`.
        folder: the folder.

    Raises:
        UserError: in all processes, before anything is loaded, if it is incomplete, lacks parameters of the model, or
            has no options for parameters that the optimizer trains, or those of another optimizer.
    """
    path = user_path(os.fspath(folder))
    is_complete = _is_complete(path)
    raise_in_all(
        None if is_complete else f"{folder}: is no complete checkpoint of torch.distributed.checkpoint (no .metadata)."
    )
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata().state_dict_metadata
    tensors = _tensors(pipeline)
    fields = _fields_of_parameters(metadata)
    groups = list(_groups(pipeline, optimizer))
    missing = [name for name in tensors if f"{_MODEL}.{name}" not in metadata]
    problem = (
        f"is of another model; it lacks {few(missing)}." if missing else _other_optimizer(optimizer, groups, fields)
    )
    raise_in_all(None if problem is None else f"{folder}: {problem}")
    targets: dict[str, Any] = {}
    for _, named in groups:
        for name, parameter in named:
            for kind, key in fields.get(name, ()):
                full_key = f"{kind}.{name}.{key}"
                targets[full_key] = _target(metadata[f"{_OPTIMIZER}.{full_key}"], parameter)
    state_dict: dict[str, Any] = {_MODEL: tensors, _OPTIMIZER: targets, _STEP: 0}
    dcp.load(state_dict, storage_reader=reader)
    _copy_to_others(pipeline, tensors)
    for group, named in groups:
        # Of a frozen parameter there may be none.
        first = next((name for name, _ in named if _options(fields, name)), None)
        for name, parameter in named:
            for kind, key in fields.get(name, ()):
                value = state_dict[_OPTIMIZER][f"{kind}.{name}.{key}"]
                if kind == _STATE:
                    # Copies of a shared parameter have states of their own.
                    optimizer.state[parameter][key] = value.clone() if isinstance(value, Tensor) else value
                elif name == first:
                    group[key] = value
    return state_dict[_STEP]


def _is_complete(path: Path) -> bool:
    return (path / ".metadata").is_file()


def _options(fields: Fields, name: str) -> set[str]:
    """Return the saved options of a parameter, but for those that a scheduler of learning rates has added."""
    return {key for kind, key in fields.get(name, ()) if kind == _GROUPS and key not in _OF_SCHEDULERS}


def _other_optimizer(
    optimizer: torch.optim.Optimizer, groups: Iterable[tuple[dict[str, Any], Named]], fields: Fields
) -> str | None:
    """Describe why the saved options are not those of the optimizer; `None` if they are."""
    trained = [(group, name) for group, named in groups for name, parameter in named if parameter.requires_grad]
    # Copies of a shared parameter have one name.
    if without := list(dict.fromkeys(name for _, name in trained if not _options(fields, name))):
        return f"has no options of the optimizer for {few(without)}, which it trains; train the same parameters."
    for group, name in trained:
        saved = _options(fields, name)
        if other := sorted((set(optimizer.defaults) - saved) | (saved - group.keys())):
            return (
                f"is of another optimizer than {type(optimizer).__name__}, or of another version of it: the options "
                f"{', '.join(other)} of {name} are not in both."
            )
    return None


def _tensors(pipeline: DepthPipeline) -> dict[str, Tensor]:
    """Return the tensors of the stages of this rank; of a shared parameter, whose copies are equal, the first one."""
    tensors: dict[str, Tensor] = {}
    for stage in pipeline.stages:
        for name, tensor in model_of(stage).state_dict().items():
            tensors.setdefault(name, tensor)
    return tensors


def _copy_to_others(pipeline: DepthPipeline, tensors: dict[str, Tensor]) -> None:
    """Copy loaded tensors to the copies in other stages of this rank."""
    for stage in pipeline.stages[1:]:
        for name, tensor in model_of(stage).state_dict().items():
            tensor.copy_(tensors[name])


def _groups(pipeline: DepthPipeline, optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], Named]]:
    """Yield the groups of the optimizer with the names of their parameters, which several stages may share."""
    named = [pair for stage in pipeline.stages for pair in model_of(stage).named_parameters()]
    names = {id(parameter): name for name, parameter in named}
    for group in optimizer.param_groups:
        yield group, [(names[id(parameter)], parameter) for parameter in group["params"]]


def _fields_of_parameters(metadata: Mapping[str, object]) -> Fields:
    """Return what is saved of the optimizer."""
    fields: Fields = {}
    for full_key in metadata:
        for kind in (_STATE, _GROUPS):
            prefix = f"{_OPTIMIZER}.{kind}."
            if full_key.startswith(prefix):
                name, _, key = full_key.removeprefix(prefix).rpartition(".")
                if key in _PARAMETERS:
                    continue
                fields.setdefault(name, []).append((kind, key))
    return fields


def _target(saved: object, parameter: nn.Parameter) -> Tensor | None:
    """Return where a value of the optimizer is loaded to: for a tensor of the parameter's shape, sharded as it is."""
    if not isinstance(saved, TensorStorageMetadata):
        return None
    dtype = saved.properties.dtype
    if saved.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(saved.size, dtype=dtype)
