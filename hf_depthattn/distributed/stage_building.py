"""Build the model of one pipeline stage, from a checkpoint or from scratch, without the rest of the model."""

from __future__ import annotations

import copy
import os
import re
import zlib
from collections import defaultdict

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.adapter_files import check_no_adapter
from ..checkpoints.model_loading import check_checkpoint, load_complete, load_config
from ..checkpoints.source_folder import find_folder
from ..configuration_depthattn import DepthAttnConfig
from ..errors import UserError
from ..modeling_depthattn import DepthAttnForCausalLM
from .stage_model import router_layers, stage_class
from .stage_plan import StagePlan

# A decoder layer and everything in it.
_LAYER = re.compile(r"^(.*?\blayers\.\d+)\b")


def routers_of(config: DepthAttnConfig, model_class: type[PreTrainedModel] = DepthAttnForCausalLM) -> tuple[int, ...]:
    """Return the layers whose router logits the loss uses, for `plan_stages`; none without an auxiliary loss.

    Args:
        config: the model's config.
        model_class: `DepthAttnForCausalLM` or a subclass.

    Raises:
        ValueError: if a layer of the host records several tensors of router logits.
    """
    if not getattr(config, "output_router_logits", False):
        return ()
    with torch.device("meta"):
        return router_layers(model_class(copy.deepcopy(config)))


def stage_from_pretrained(
    folder: str | os.PathLike,
    plan: StagePlan,
    *,
    model_class: type[PreTrainedModel] = DepthAttnForCausalLM,
    **kwargs,
) -> PreTrainedModel:
    """Load the model of one stage; of the checkpoint, only the tensors of the stage are read.

    Args:
        folder: a checkpoint of the whole model, or its name on the Hub.
        plan: the plan of the stage.
        model_class: `DepthAttnForCausalLM` or a subclass.
        **kwargs: those of `from_pretrained`, such as `dtype`.

    Raises:
        UserError: if there is no such checkpoint, or a tensor of the stage is missing or has another shape.
    """
    path, _ = find_folder(os.fspath(folder), kwargs.pop("revision", None))
    return load_complete(stage_class(model_class, plan), path, name=os.fspath(folder), **kwargs)


def check_source(
    source: str | os.PathLike, model_class: type[PreTrainedModel] = DepthAttnForCausalLM
) -> DepthAttnConfig:
    """Check a checkpoint of the whole model without reading weights, so that all ranks find the same mistakes.

    Args:
        source: a folder, or its name on the Hub.
        model_class: `DepthAttnForCausalLM` or a subclass.

    Returns:
        Its config.

    Raises:
        UserError: if it is no checkpoint of a causal LM with depth attention, or is damaged.
    """
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"source: got a {type(source).__name__}; it must be the folder of a checkpoint, its name on the Hub, or a "
            "DepthAttnConfig."
        )
    name = os.fspath(source)
    path, _ = find_folder(name)
    check_no_adapter(path, name)
    config = load_config(path, name=name)
    if not isinstance(config, DepthAttnConfig):
        raise UserError(
            f"{name}: is a stock model ({config.model_type}); convert it with `depthattn retrofit`, or pass a "
            "DepthAttnConfig of its config for a new model."
        )
    check_checkpoint(path, model_class=model_class, name=name)
    return config


def stage_from_config(
    config: DepthAttnConfig,
    plan: StagePlan,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    model_class: type[PreTrainedModel] = DepthAttnForCausalLM,
) -> PreTrainedModel:
    """Build the model of one stage with initial weights.

    The weights of a layer, of the embeddings and of the head depend on `seed` and on their name alone: the whole model
    has the same ones for every number of stages (a single stage has all of it), and the tensors that two stages share
    are equal. They are not those that `DepthAttnForCausalLM(config)` draws after `torch.manual_seed(seed)`, where
    every layer continues the random numbers of the one before. The global random state is unchanged.

    Args:
        config: the model's config.
        plan: the plan of the stage.
        seed: the seed, the same for all stages.
        dtype: dtype of the parameters; those that stay float32 are float32. The config's by default.
        device: device of the parameters.
        model_class: `DepthAttnForCausalLM` or a subclass.
    """
    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        model = stage_class(model_class, plan)._from_config(copy.deepcopy(config), **options)
    model.to_empty(device=device)
    model.tie_weights(recompute_mapping=False)
    _initialise(model, seed)
    return model.train()


def _initialise(model: PreTrainedModel, seed: int) -> None:
    """Initialise every layer and every other module with random numbers of its own."""
    for module in model.modules():
        # To torch's types, every attribute is a tensor or a module.
        module._is_hf_initialized = True  # type: ignore[assignment]
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    done: set[int] = set()
    for name, modules in _parts(model):
        own = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
        # A head that is tied to the embeddings.
        if own and own <= done:
            continue
        done |= own
        for module in modules:
            module._is_hf_initialized = False  # type: ignore[assignment]
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(seed + zlib.crc32(name.encode()))
            model.initialize_weights()


def _parts(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """Return every decoder layer with all modules in it, and every other module alone, by name."""
    parts: dict[str, list[nn.Module]] = defaultdict(list)
    for name, module in model.named_modules():
        layer = _LAYER.match(name)
        parts[layer[1] if layer else name].append(module)
    return list(parts.items())
