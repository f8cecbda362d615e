"""Styles for tensor-parallel plans of transformers."""

from typing import Any

from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from .summed_gradients import sums_gradients

#: Parameters that every process has whole, and uses with its own heads. transformers' style for them,
#: "replicated_with_grad_allreduce", sums the accumulated `.grad` after every backward pass, so that earlier passes are
#: summed several times.
SUMMED_GRADIENTS = "depthattn_summed_gradients"
#: A module that uses its own part of sharded parameters; transformers 5.17 has no style for it.
LOCAL_PARAMETERS = "depthattn_local_parameters"


class SummedGradientsParallel(TensorParallelLayer):
    """The style of a module whose parameters every process has whole and uses with its own heads."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        forward = module.forward

        def forward_with_sums(*args, **kwargs):
            with sums_gradients([module], mesh.get_group()):
                return forward(*args, **kwargs)

        # To torch's types, every attribute is a tensor or a module.
        module.forward = forward_with_sums  # type: ignore[method-assign, assignment]
        return module


class LocalParametersParallel(TensorParallelLayer):
    """The style of a module whose parameters have styles of their own, and which uses its part of them."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True


def sum_gradients_in_plan(plan: dict[str, str]) -> dict[str, str]:
    """Return the entries of a tensor-parallel plan that need this style, with it.

    Args:
        plan: the plan of a model.
    """
    return {name: SUMMED_GRADIENTS for name, style in plan.items() if style == "replicated_with_grad_allreduce"}


ALL_PARALLEL_STYLES.register(SUMMED_GRADIENTS, SummedGradientsParallel())
ALL_PARALLEL_STYLES.register(LOCAL_PARAMETERS, LocalParametersParallel())
