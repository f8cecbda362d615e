"""Scaled sums of the residual stream and the embedding before every layer, as a depth connection."""

from types import ModuleType

import torch
from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .depth_state import DepthState
from .residual_connection import ResidualSite


class EmbeddingMix(nn.Module):
    """The scaled sum of the residual stream and the embedding before one decoder layer, in float32 at least."""

    def __init__(self):
        super().__init__()
        # FSDP2 cannot shard parameters without dimensions.
        self.stream_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        self.embedding_scale = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, stream: Tensor, embeddings: Tensor) -> Tensor:
        """Return the sum of stream and embeddings, all `[B, T, D]`."""
        return (self.stream_scale * stream + self.embedding_scale * embeddings).to(stream.dtype)


class X0LambdasSite(ResidualSite):
    """Embedding skips (x0 lambdas of nanochat): before decoder layer l, `h = r_l h + x_l e` with the embedding e.

        embedding e --> r_1 e + x_1 e = partial ----> h --> sublayer --> y
             |                            ^                              |
             |                            +---- partial = partial + y <--+
             |                            |
             +--> sources[0] ------> after the MLP of layer l, before layer l + 1:
                                     partial = r_{l+1} partial + x_{l+1} e

    The scales of the first layer are in the site of its attention, those of layer l + 1 in the site of the MLP of
    layer l: an average belongs to the state, so that no read computes it twice.

    I/O per sublayer and token: 3.5 D, since the embedding is read once per layer.

    Parameters (float32, never weight-decayed), in the first site and in the MLP sites but the last:
        mix.stream_scale `[1]`: r_l, 1.
        mix.embedding_scale `[1]`: x_l, 0. These initial values are the host; nanochat starts from others (r from 1.15
            to 1.05 and x from 0.20 to 0.05 over the layers).
    """

    starts_as_host = True
    host_condition = "the scales of the stream are 1 and those of the embedding 0"
    tag = "x0-lambdas"
    paper = "nanochat: [github.com/karpathy/nanochat](https://github.com/karpathy/nanochat)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return "scaled sums of stream and embedding before every layer (x0 lambdas)"

    @classmethod
    def num_finished_sources(cls, config: DepthAttnConfig, site: int) -> int:
        return 1

    @classmethod
    def live_sources(cls, config: DepthAttnConfig, site: int) -> tuple[int, ...]:
        # The last layer has no scales after it.
        return (0,) if site < config.num_sublayers - 2 else ()

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site)
        precedes_layer = site % 2 == 1 and site < config.num_sublayers - 1
        self.mix = EmbeddingMix() if site == 0 or precedes_layer else None

    def begin(self, embeddings: Tensor) -> DepthState:
        assert self.mix is not None, "the first site has scales"
        return DepthState(sources=(embeddings,), partial=self.mix(embeddings, embeddings))

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        partial = state.partial + output
        if self.mix is not None and self.site > 0:
            partial = self.mix(partial, state.sources[0])
        return state._replace(partial=partial)

    def init_parameters(self, init: ModuleType) -> None:
        if self.mix is not None:
            init.ones_(self.mix.stream_scale)
            init.zeros_(self.mix.embedding_scale)
