"""Styles for tensor-parallel plans of transformers."""

from contextlib import AbstractContextManager
from types import MethodType
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


class _ContextParallel(TensorParallelLayer):
    """A style that only puts a context around the forward of a module."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        def forward(called: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with self.context_around_forward(called, mesh):
                return type(called).forward(called, *args, **kwargs)

        # A method, so that copies of the module (PEFT's `modules_to_save`) use their own parameters.
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        return module


class SummedGradientsParallel(_ContextParallel):
    """The style of a module whose parameters every process has whole and uses with its own heads."""

    def context_around_forward(self, module: nn.Module, mesh: Any) -> AbstractContextManager[None]:
        return sums_gradients([module], mesh.get_group())


class LocalParametersParallel(_ContextParallel):
    """The style of a module whose parameters have styles of their own, and which uses its part of them."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True


def sum_gradients_in_plan(plan: dict[str, str]) -> dict[str, str]:
    """Return the entries of a tensor-parallel plan that need this style, with it.

    Args:
        plan: the plan of a model.
    """
    return {name: SUMMED_GRADIENTS for name, style in plan.items() if style == "replicated_with_grad_allreduce"}


# The registry's types are those of functions.
ALL_PARALLEL_STYLES.register(SUMMED_GRADIENTS, SummedGradientsParallel())  # type: ignore[arg-type]
ALL_PARALLEL_STYLES.register(LOCAL_PARAMETERS, LocalParametersParallel())  # type: ignore[arg-type]
