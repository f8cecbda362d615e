"""The PEFT adapter of a model in pipeline stages, which `parallelize` adds with `peft.inject_adapter_in_model`.

As for any model with an adapter, only the adapter is saved, in PEFT's format: the host's weights are those of the
checkpoint that the stages were built from.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoints.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..errors import UserError

# Adapters are saved as those of a `PeftModel`, in which the model is at this place.
_PREFIX = "base_model.model."


def adapter_of(model: PreTrainedModel) -> str | None:
    """Return the name of the adapter of a stage's model, `None` without one.

    Args:
        model: the model of a stage.

    Raises:
        UserError: if there are several.
    """
    configs = cast(dict[str, Any], getattr(model, "peft_config", {}))
    if len(configs) > 1:
        raise UserError(f"adapters {', '.join(configs)}: a pipeline is saved with one adapter.")
    return next(iter(configs), None)


def trained_beside_adapter(model: PreTrainedModel) -> list[str]:
    """Return the names of trained parameters that the adapter of a stage does not save, or all without one.

    Args:
        model: the model of a stage.
    """
    name = adapter_of(model)
    parameters = dict(model.named_parameters())
    saved = set() if name is None else {id(tensor) for tensor in _tensors_of(model, name, parameters).values()}
    return [key for key, value in parameters.items() if value.requires_grad and id(value) not in saved]


def write_adapter(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter of one stage, if it has one.

    Args:
        model: the model of the stage.
        tensors: its state dict, without what another stage saves.
        folder: the folder to create.
    """
    folder.mkdir()
    name = adapter_of(model)
    if name is None:
        return
    saved = {f"{_PREFIX}{key}": tensor.contiguous() for key, tensor in _tensors_of(model, name, tensors).items()}
    save_file(saved, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(cast(dict[str, Any], model.peft_config)[name])
    config.base_model_name_or_path = config.base_model_name_or_path or model.name_or_path or None
    config.inference_mode = True
    config.save_pretrained(folder)


def merge_adapters(folder: Path, stages: Sequence[Path]) -> None:
    """Make one adapter of those of the stages.

    Args:
        folder: the folder of the adapter.
        stages: the folders of the stages.
    """
    adapted = [stage for stage in stages if (stage / ADAPTER_CONFIG).is_file()]
    tensors: dict[str, Tensor] = {}
    for stage in adapted:
        tensors |= load_file(stage / ADAPTER_WEIGHTS)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (adapted[0] / ADAPTER_CONFIG).rename(folder / ADAPTER_CONFIG)


def adapted_shared_parameters(model: PreTrainedModel) -> list[str]:
    """Return the names of parameters of several stages to which an adapter adds its own, which would differ.

    Args:
        model: the model of a stage.
    """
    shared = (*model.parameters_of_all_stages, *model.parameters_of_both_ends)  # type: ignore[misc]
    # The place of the adapted module in the layers of all tuners of PEFT.
    return [name for name in shared if hasattr(model.get_submodule(name.rpartition(".")[0]), "base_layer")]


def _tensors_of(model: PreTrainedModel, adapter: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=adapter, save_embedding_layers=False)
