"""Parameters of pipeline stages, counted on a model without memory, and what tensor parallelism leaves of them."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..attn_res_reads import DEPTH_READS
from ..configuration_depthattn import DepthAttnConfig
from ..modeling_depthattn import DepthAttnForCausalLM
from .stage_plan import StagePlan

# In the names of transformers' styles that split parameters between the devices of a tensor-parallel group.
_SPLITTING = ("colwise", "rowwise")
# Names of the number of experts per token in configs of hosts.
_NUM_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")


class LayerCount(NamedTuple):
    """A decoder layer, or the modules outside of layers, on one device.

    Attributes:
        num_parameters: number of parameters.
        output_channels: channels per token of the outputs of all matrices, those of the experts of a token counted.
    """

    num_parameters: int
    output_channels: int

    def __add__(self, other: tuple) -> "LayerCount":
        return LayerCount(*(own + others for own, others in zip(self, other, strict=True)))


class ModelCount(NamedTuple):
    """The parameters of a model, by where a pipeline has them.

    Attributes:
        layers: every decoder layer.
        first: what is in the first stage beside its layers: the embeddings.
        last: what is in the last stage beside its layers: the final norm and the head, with tied embeddings these.
        every: what is in every stage: queries and key norms of AttnRes reads.
    """

    layers: tuple[LayerCount, ...]
    first: LayerCount
    last: LayerCount
    every: LayerCount

    def stage(self, plan: StagePlan) -> LayerCount:
        """Return the count of a stage.

        Args:
            plan: its plan.
        """
        parts = [self.every, *(self.layers[layer] for layer in plan.layers)]
        parts += [self.first] * plan.is_first + [self.last] * plan.is_last
        return sum(parts, start=_NOTHING)

    def rank(self, plans: Sequence[StagePlan]) -> LayerCount:
        """Return the count of a rank.

        Args:
            plans: the plans of its stages.
        """
        return sum(map(self.stage, plans), start=_NOTHING)


_NOTHING = LayerCount(0, 0)


def count_parameters(config: DepthAttnConfig, num_tensor: int = 1) -> ModelCount:
    """Count the parameters of a causal LM per device.

    Args:
        config: the model's config.
        num_tensor: size of a tensor-parallel group, which splits the parameters that the model's plan names
            (`model.tp_plan`); all others are on every device.
    """
    with torch.device("meta"):
        model = DepthAttnForCausalLM(config)
    split = [_pattern(name) for name, style in model.tp_plan.items() if any(kind in style for kind in _SPLITTING)]
    num_active = next((getattr(config, name) for name in _NUM_ACTIVE_EXPERTS if hasattr(config, name)), 1)
    layers = [_NOTHING] * config.host_config.num_hidden_layers
    first = last = every = _NOTHING
    tied = set(model.all_tied_weights_keys.values())
    for name, parameter in model.named_parameters():
        num_devices = num_tensor if any(pattern.match(name) for pattern in split) else 1
        # The weights of all experts are one tensor, [experts, out, in].
        active = {2: parameter.shape[:1], 3: (num_active, *parameter.shape[1:2])}.get(parameter.dim(), (0,))
        count = LayerCount(-(-parameter.numel() // num_devices), math.prod(active) // num_devices)
        child, _, _ = name.removeprefix(f"{model.base_model_prefix}.").partition(".")
        if layer := re.match(rf"{model.base_model_prefix}\.layers\.(\d+)\.", name):
            layers[int(layer[1])] += count
        elif child == DEPTH_READS:
            every += LayerCount(count.num_parameters, 0)
        elif child in dict(model.base_model.named_children()) and not child.endswith("norm"):
            first += count
            last += count if name in tied else _NOTHING
        else:
            last += count
    return ModelCount(tuple(layers), first, last, every)


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", r"\d+") + r"(\.|$)")
