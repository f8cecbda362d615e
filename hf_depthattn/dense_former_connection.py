"""DenseFormer as a depth connection."""

from types import ModuleType

import torch
from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .depth_state import DepthState
from .residual_connection import ResidualSite


class DepthWeightedAverage(nn.Module):
    """A learned sum of the embedding and the outputs of all decoder layers so far, `sum_j weight_j X_j`.

    Args:
        num_states: number of terms.
    """

    def __init__(self, num_states: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_states, dtype=torch.float32))

    def forward(self, states: tuple[Tensor, ...]) -> Tensor:
        """Return the sum, `[B, T, D]`, in the dtype of the states.

        Args:
            states: one tensor `[B, T, D]` for each weight.
        """
        dtype = states[0].dtype
        compute_dtype = torch.promote_types(dtype, torch.float32)
        weights = self.weight.to(compute_dtype).unbind()
        # The newest first: with the initial weights, the sum is that state exactly. The states are not converted,
        # since copies of them would be kept for the backward pass.
        total = torch.zeros_like(states[-1], dtype=compute_dtype)
        for weight, state in zip(reversed(weights), reversed(states), strict=True):
            total = torch.addcmul(total, weight, state)
        return total.to(dtype)


class DenseFormerSite(ResidualSite):
    r"""DenseFormer: a depth-weighted average after every decoder layer (arXiv 2402.02622, Eq. 1).

    The sublayers of layer l add to `p` as in the host. Then, with `X_0` the embedding and `X_l = p`,

        p = sum_{j <= l} weight_j X_j

        sources (X_0, ..., X_{l-1}) ---------------------------------+
                                                                     v
        partial ----> h --> sublayer --> y --> partial + y = X_l --> average (MLP sites) --> partial
           (the residual sum)                        |
                                                     +--> sources

    The average follows the last layer too, and the output site reads it.

    Parameters of the MLP site of layer l, 1 to L (float32, never weight-decayed); other sites have none:
        average.weight `[l + 1]`: 1 for the newest, 0 for others; in total about L^2 / 2.

    I/O per sublayer and token: (3 + (l + 1) / 2) D. Layers share the states: a model keeps L + 1 of them.
    """

    starts_as_host = True
    numbers_sources = True
    host_condition = "the weights of its averages have their initial values"
    tag = "denseformer"
    paper = "DenseFormer: [arXiv 2402.02622](https://arxiv.org/abs/2402.02622)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return "DenseFormer (a depth-weighted average after every layer)"

    @classmethod
    def num_finished_sources(cls, config: DepthAttnConfig, site: int) -> int:
        return site // 2 + 1

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site)
        ends_layer = site % 2 == 1
        self.average = DepthWeightedAverage(site // 2 + 2) if ends_layer else None

    def begin(self, embeddings: Tensor) -> DepthState:
        return DepthState(sources=(embeddings,), partial=embeddings)

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        # Under autocast, sublayers return bfloat16 while the embedding is float32.
        partial = state.partial + output.to(state.partial.dtype)
        if self.average is None:
            return state._replace(partial=partial)
        sources = (*state.sources, partial)
        return state._replace(sources=sources, partial=self.average(sources))

    def init_parameters(self, init: ModuleType) -> None:
        if self.average is not None:
            weight = torch.zeros_like(self.average.weight)
            weight[-1] = 1
            init.copy_(self.average.weight, weight)
