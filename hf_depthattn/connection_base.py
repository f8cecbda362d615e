"""The base class of depth connections: what a sublayer reads, and where its output goes.

A connection has one small module per *site*. Site `s` belongs to sublayer `s` of the network (attention and MLP of
each layer in turn, `0 .. 2L-1`); the output site follows the last sublayer. The state is immutable:

    begin(embeddings) -> state              once, before site 0
    site(state, weights) -> h, state, _     read: the input of the sublayer (in `forward`, so that module hooks run)
    site.enter(x) -> x                      after the norm of the sublayer's input
    site.write(state, y) -> state           write: after the sublayer
"""

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .depth_state import Carried, DepthState
from .float32_module import Float32Module


class DepthSite(Float32Module):
    """Base class of depth connections, with one instance per site.

    Args:
        config: the model's config.
        site: sublayer number, or `config.num_sublayers` for the output site.

    Attributes:
        starts_as_host: whether a model with initial parameters computes what its host computes, up to rounding, if the
            options have the values that `DepthOption.exact` names.
        inexact_reason: why it does not, if so.
        host_condition: when a trained model still computes what its host computes, for model cards; empty if always.
        numbers_sources: whether parameters belong to the numbers of sources, so that the number of sources at a site
            is fixed: a skipped layer then has to write zeros.
        embedding_source: index of the embedding in the weights that a read of several sources returns.
        tag: tag in model cards; empty for the host's own connection.
        paper: name and link of the paper in model cards.
    """

    starts_as_host: bool = False
    inexact_reason: str = ""
    host_condition: str = ""
    numbers_sources: bool = False
    embedding_source: int = 0
    tag: str = ""
    paper: str = ""

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        """Describe the connection of a config in a few words, for reports and model cards.

        Args:
            config: a config with this connection.
        """
        raise NotImplementedError

    @classmethod
    def num_finished_sources(cls, config: DepthAttnConfig, site: int) -> int:
        """Return the number of tensors in `state.sources` before a site other than 0.

        Args:
            config: a config with this connection.
            site: sublayer number.
        """
        return 0

    @classmethod
    def live_sources(cls, config: DepthAttnConfig, site: int) -> tuple[int, ...]:
        """Return which of these sources the site or a later one uses, ascending; a state needs no others.

        Args:
            config: a config with this connection.
            site: sublayer number, not 0.
        """
        return tuple(range(cls.num_finished_sources(config, site)))

    @classmethod
    def partial_is_source(cls, config: DepthAttnConfig, site: int) -> bool:
        """Return whether the next write adds `state.partial` to the sources as it is.

        Args:
            config: a config with this connection.
            site: sublayer number, not 0.
        """
        return False

    @classmethod
    def num_partial_streams(cls, config: DepthAttnConfig) -> int:
        """Return the number of streams in `state.partial`.

        Args:
            config: a config with this connection.
        """
        return 1

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__()
        self.site = site

    def begin(self, embeddings: Tensor) -> DepthState:
        """Return the state before site 0.

        Args:
            embeddings: the embeddings, `[B, T, D]`.
        """
        return DepthState(sources=(), partial=embeddings)

    def forward(
        self,
        state: DepthState,
        depth_reads: Carried | None = None,
        last_site: int | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, DepthState, Tensor | None]:
        """Read from the state.

        Args:
            state: the state before the sublayer.
            depth_reads: the weights of all reads (`attn_res_reads.ReadWeights`), for connections that have some.
            last_site: the last site that may use what this read computes in advance; by default that of the schedule.
            return_weights: whether to return the weights of the read.

        Returns:
            The sublayer's input before its norm, `[B, T, D]`, the state for `write`, and the weights
            `[B, T, heads, sources]` or `None`.
        """
        raise NotImplementedError

    def enter(self, x: Tensor) -> Tensor:
        """Return the input of the sublayer's module, and of MoDA's projections.

        Args:
            x: the read after the host's pre-norm, `[B, T, D]`.
        """
        return x

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        """Return the state after the sublayer.

        Args:
            state: the state after the read.
            output: the sublayer's output, `[B, T, D]`.
        """
        raise NotImplementedError

    def init_parameters(self, init: ModuleType) -> None:
        """Initialise the parameters of this site.

        Args:
            init: the module `transformers.initialization`.
        """

    def init_sublayer(self, modules: Sequence[nn.Module]) -> None:
        """Change the initial weights of the sublayer after this site; by default they are the host's.

        Args:
            modules: the modules of the sublayer, after the host has initialised them.
        """
