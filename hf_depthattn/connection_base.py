"""The base class of depth connections: what a sublayer reads, and where its output goes.

A connection is a small module per *site*. Site `s` is sublayer `s` of the network (attention and MLP of each layer in
turn, `0 .. 2L-1`), and the output site follows the last sublayer. The state that travels from layer to layer is
immutable:

    begin(embeddings) -> state      once, before site 0
    site(state) -> h                the input of the sublayer (`forward`, so that hooks on parameters run)
    site.write(state, y) -> state   after the sublayer
"""

from types import ModuleType

from torch import Tensor

from .configuration_depthattn import DepthAttnConfig
from .depth_state import DepthState
from .float32_module import Float32Module


class DepthSite(Float32Module):
    """Base of the connections: one instance per site.

    Args:
        config: the model's config.
        site: sublayer number, or `config.num_sublayers` for the output site.
    """

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__()
        self.site = site

    def begin(self, embeddings: Tensor) -> DepthState:
        """The state before site 0."""
        return DepthState(sources=(), partial=embeddings)

    def forward(self, state: DepthState, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Read: the sublayer's input `[B, T, D]`, and the depth weights `[B, T, heads, sources]` if asked for."""
        raise NotImplementedError

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        """The state after the sublayer's output `[B, T, D]`."""
        raise NotImplementedError

    def init_parameters(self, init: ModuleType) -> None:
        """Initialise this site's own parameters with the functions of `transformers.initialization`."""
