"""The base class of connections with several residual streams (Hyper-Connections and their relatives)."""

from types import ModuleType

import torch
from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .connection_base import DepthSite
from .depth_state import Carried, DepthState


class StreamWeights(nn.Module):
    """The weights with which a sublayer reads, mixes and writes the streams of a token."""

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of every token.

        Args:
            streams: the streams before the sublayer, `[B, T, n, D]`, float32 (float64 in float64 models).

        Returns:
            `[a | A]`, `[B, T, n, n + 1]`: column 0 has the weights of the read, column 1 + k those of the new stream
            k; and the weights of the write, `[B, T, n]`. Both in the dtype of the streams.
        """
        raise NotImplementedError

    def init_parameters(self, init: ModuleType) -> None:
        """Initialise the parameters so that the model computes what its host computes.

        Args:
            init: the module `transformers.initialization`.
        """
        raise NotImplementedError


class StreamSite(DepthSite):
    r"""n residual streams: a sublayer reads a sum of them, they are mixed, and its output is added to each.

    `h = a^T H`, `H <- A^T H + b y^T`, with the streams `H` `[n, D]` of a token:

        partial = H [B, T, n, D] ---+--> weights(H) = [a | A], b
                                    |
                                    +--> [a | A]^T H --+--> h --> sublayer --> y
                                                       |                       |
          partial = A^T H + b y^T  <--- A^T H ---------+                       |
                                   <--- b y^T ---------------------------------+

    All streams start as the embedding, and the output site reads their mean. The read computes the weights once, with
    everything that depends on the streams before the sublayer; `write_weights` of the state takes `b` to the write.
    Weights and sums are float32, also under autocast; streams have the dtype of the embedding.
    """

    starts_as_host = True

    @classmethod
    def num_partial_streams(cls, config: DepthAttnConfig) -> int:
        return config.num_streams

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site)
        self.num_streams = config.num_streams
        self.weights = None if site == config.num_sublayers else self.stream_weights(config, site)

    def stream_weights(self, config: DepthAttnConfig, site: int) -> StreamWeights:
        """Return the module with the weights of a sublayer.

        Args:
            config: the model's config.
            site: sublayer number.
        """
        raise NotImplementedError

    def begin(self, embeddings: Tensor) -> DepthState:
        return DepthState(sources=(), partial=embeddings.unsqueeze(-2).expand(-1, -1, self.num_streams, -1))

    def forward(
        self,
        state: DepthState,
        depth_reads: Carried | None = None,
        last_site: int | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, DepthState, Tensor | None]:
        dtype = state.partial.dtype
        with torch.autocast(device_type=state.partial.device.type, enabled=False):
            streams = state.partial.to(torch.promote_types(dtype, torch.float32))
            if self.weights is None:
                return _mean(streams).to(dtype), state, None
            mixing, write_weights = self.weights(streams)
            h, mixed = (mixing.transpose(-1, -2) @ streams).split([1, self.num_streams], -2)
        state = state._replace(partial=mixed.to(dtype), write_weights=write_weights)
        return h.squeeze(-2).to(dtype), state, None

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        weights = state.write_weights
        assert weights is not None, "the read sets them"
        dtype = weights.dtype
        added = torch.addcmul(state.partial.to(dtype), weights.unsqueeze(-1), output.to(dtype).unsqueeze(-2))
        return state._replace(partial=added.to(state.partial.dtype), write_weights=None)

    def init_parameters(self, init: ModuleType) -> None:
        if self.weights is not None:
            self.weights.init_parameters(init)


def _mean(streams: Tensor) -> Tensor:
    """Return the mean of the streams, which of n equal streams is exactly the stream, for every n."""
    first = streams[..., 0, :]
    return first + (streams - first.unsqueeze(-2)).mean(-2)
