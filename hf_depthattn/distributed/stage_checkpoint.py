"""Save a model in pipeline stages as one checkpoint of the whole model, which loads as any other.

Every stage writes its own tensors; no process gathers the model:

    FOLDER/                                     written beside its final place, renamed when it is complete
        stage-0/model.safetensors   ----->      model-00001-of-00002.safetensors
        stage-1/model.safetensors   ----->      model-00002-of-00002.safetensors
        stage-0/config.json, code   ----->      config.json, code, with one index and a card

Of stages with a PEFT adapter, the adapter is saved (`stage_adapter`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from torch import nn

from ..checkpoints.adapter_files import ADAPTER_CONFIG
from ..checkpoints.checkpoint_files import INDEX_FILE, SINGLE_FILE, TensorEntry, read_weight_files, write_index
from ..configuration_depthattn import DepthAttnConfig
from ..conversion.output_folder import complete_folder
from ..errors import UserError
from ..errors.messages import one_line
from ..model_card import write_missing_card
from ..modeling_depthattn import gathered_state_dict
from ..utils.paths import user_path
from ..utils.text_table import few
from .common_errors import first_problem, raise_in_all
from .pipeline import DepthPipeline
from .shared_parameters import model_of
from .stage_adapter import adapter_of, merge_adapters, trained_beside_adapter, write_adapter
from .stage_runtime import DepthPipelineStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_pipeline(
    pipeline: DepthPipeline,
    folder: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Save the whole model to one folder that `from_pretrained` loads, or its PEFT adapter if it has one.

    The folder of an adapter is that of `PeftModel.save_pretrained`, without the host's weights:
    `PeftModel.from_pretrained(model, folder)` loads it into the model that the stages were built from.

    All processes call it, and all must see the same file system. Of several pipelines (FSDP2, DDP), the one with the
    first process writes, and every stage has at least one file. The folder appears when it is complete.

    Args:
        pipeline: the stages of this rank.
        folder: the folder to create.
        tokenizer: saved along.
        overwrite: replace an existing checkpoint.
        max_shard_size: largest file, as in `save_pretrained`.

    Raises:
        UserError: in all processes, if the folder exists, one of them cannot write, or parameters are trained that an
            adapter does not save.
    """
    is_adapter = _has_adapter(pipeline)
    if dist.get_rank() != 0:
        partial = _from_first_process(None)
        if partial is not None:
            _save_stages(pipeline, partial, max_shard_size, is_adapter)
        if (problem := _from_first_process(None)) is not None:
            raise UserError(problem)
        return
    announced = False
    try:
        target = user_path(os.fspath(folder)).resolve()
        config_file = ADAPTER_CONFIG if is_adapter else "config.json"
        with complete_folder(target, overwrite, is_checkpoint=not is_adapter, config_file=config_file) as partial:
            _from_first_process(partial)
            announced = True
            if problem := _save_stages(pipeline, partial, max_shard_size, is_adapter):
                raise UserError(problem)
            folders = _stage_folders(partial, pipeline.stages[0].num_stages)
            if is_adapter:
                merge_adapters(partial, folders)
            else:
                _merge(partial, folders)
                config = cast(DepthAttnConfig, model_of(pipeline.stages[0]).config)
                write_missing_card(partial, config, depth_class="DepthAttnForCausalLM", name=target.name)
            for each in folders:
                shutil.rmtree(each)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
    except Exception as error:
        if not announced:
            _from_first_process(None)
        _from_first_process(one_line(error))
        raise
    _from_first_process(None)


def _has_adapter(pipeline: DepthPipeline) -> bool:
    """Return whether a stage of any process has an adapter; raise in all processes if one cannot be saved."""
    adapters, problem = [], None
    models = [model_of(stage) for stage in pipeline.stages]
    try:
        adapters = [adapter for model in models if (adapter := adapter_of(model)) is not None]
    except UserError as error:
        problem = str(error)
    raise_in_all(problem)
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, adapters)
    if not any(of_all):
        return False
    # Other stages may have none.
    lost = [name for model in models for name in trained_beside_adapter(model)]
    if lost:
        problem = (
            f"{few(lost)}: would be lost, trained but not part of the adapter; name its module in the "
            "adapter's `modules_to_save`, or freeze it. `save_training_state` saves all parameters."
        )
    raise_in_all(problem)
    return True


def _save_stages(pipeline: DepthPipeline, partial: Path, max_shard_size: int | str, is_adapter: bool) -> str | None:
    """Save the stages of this rank, each to a folder of its own, and return the first problem of any process."""
    writes = 0 in dist.get_process_group_ranks(pipeline.group)
    problem = None
    for stage in pipeline.stages:
        model = model_of(stage)
        # Also after a problem: shards of FSDP2 are gathered by several processes.
        tensors = gathered_state_dict(model, keeps=writes)
        if not writes or problem is not None:
            continue
        for name in _saved_elsewhere(stage, model):
            tensors.pop(name, None)
        folder = partial / _folder_name(stage.stage_index)
        try:
            if is_adapter:
                write_adapter(model, tensors, folder)
            else:
                model.save_pretrained(folder, state_dict=tensors, max_shard_size=max_shard_size)
        except Exception as error:
            problem = f"stage {stage.stage_index}: {one_line(error)}"
    return first_problem(problem)


def _saved_elsewhere(stage: DepthPipelineStage, model: nn.Module) -> set[str]:
    """Return the names of tensors that the first stage saves: parameters of several stages, and weights tied to them.

    Args:
        stage: the stage.
        model: its model.
    """
    if stage.is_first:
        return set()
    shared = {*model.parameters_of_all_stages, *model.parameters_of_both_ends}  # type: ignore[misc]
    tied = cast(dict[str, str], model.all_tied_weights_keys)
    return shared | {name for name, source in tied.items() if source in shared}


def _stage_folders(partial: Path, num_stages: int) -> list[Path]:
    """Return the folders of the stages, after checking that this process sees them."""
    folders = [partial / _folder_name(stage) for stage in range(num_stages)]
    unseen = [folder.name for folder in folders if not folder.is_dir()]
    if unseen:
        raise UserError(
            f"{', '.join(unseen)}: was not written where the first process sees it; all processes need the same file "
            "system."
        )
    return folders


def _merge(partial: Path, folders: list[Path]) -> None:
    """Make one checkpoint of the folders of the stages."""
    weights = [read_weight_files(folder) for folder in folders]
    num_files = sum(len(each.shards) for each in weights)
    weight_map: dict[str, str] = {}
    entries: list[TensorEntry] = []
    number = 0
    for each in weights:
        for shard in each.shards:
            number += 1
            name = SINGLE_FILE if num_files == 1 else f"model-{number:05d}-of-{num_files:05d}.safetensors"
            shard.path.rename(partial / name)
            weight_map |= dict.fromkeys(shard.tensors, name)
            entries += shard.tensors.values()
    if num_files > 1:
        write_index(partial, weight_map, entries)
    for path in folders[0].iterdir():
        # The card has the name of the folder.
        if path.name not in (INDEX_FILE, "README.md"):
            path.rename(partial / path.name)


def _folder_name(stage: int) -> str:
    return f"stage-{stage}"


def _from_first_process(value: Any) -> Any:
    """Return what the first process gives, in all processes."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
