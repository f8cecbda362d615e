"""The queries and key-norm weights of all AttnRes reads of a model, in one module."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .depth_options import DepthConnectionType, QueryType
from .depth_state import Carried
from .float32_module import Float32Module
from .token_layout import ALL_TOKENS, TokenLayout

#: Name of the module in the base model.
DEPTH_READS = "depth_reads"


class ReadWeights(NamedTuple):
    """The weights of all reads as the layers get them, in a `Carried`. The last row is that of the output site.

    Attributes:
        score_weights: queries times key-norm weights, `[num_sublayers + 1, D]`.
        key_norm: the key-norm weights, `[num_sublayers + 1, D]`, if sites multiply queries of their own by them.
        schedule: the `AttnResSchedule` of the config.
    """

    score_weights: Tensor
    key_norm: Tensor | None
    schedule: str


class DepthReads(Float32Module):
    """The queries and key-norm weights of all sites, so that one read can compute parts of later ones.

    The product `query . (key_norm * k) = (query * key_norm) . k` is computed once per forward pass of the model. It is
    in this module's `forward` because offloading and FSDP2 materialise a module's parameters only during its own
    forward. The normalisation itself is part of the read (`attn_res_ops`).

    Parameters (float32, never weight-decayed):
        query `[num_sublayers + 1, D]`: zeros, so that initial reads are uniform. Row 0 has a gradient of zero.
        key_norm `[num_sublayers + 1, D]`: ones; absent with `key_norm=False`.

    Args:
        config: a config with AttnRes and without `static_mix`.
    """

    def __init__(self, config: DepthAttnConfig):
        super().__init__()
        shape = config.num_sublayers + 1, config.hidden_size
        self.query = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.key_norm = nn.Parameter(torch.ones(shape, dtype=torch.float32)) if config.key_norm else None
        self.gives_key_norm = config.key_norm and config.query == QueryType.INPUT

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Return the score weights `[num_sublayers + 1, D]`, and with `query="input"` the key-norm weights.

        They are plain tensors, in which FSDP2 finds where the backward of this module begins.
        """
        # Copies and products, since FSDP2 frees the parameters after this forward.
        if self.key_norm is None:
            return self.query.clone(), None
        return self.query * self.key_norm, self.key_norm.clone() if self.gives_key_norm else None

    def init_parameters(self, init: ModuleType) -> None:
        """Initialise the parameters.

        Args:
            init: the module `transformers.initialization`.
        """
        init.zeros_(self.query)
        if self.key_norm is not None:
            init.ones_(self.key_norm)


def read_weights(reads: DepthReads, schedule: str, tokens: TokenLayout = ALL_TOKENS) -> Carried:
    """Return the `ReadWeights` of one forward pass, which the base model passes to its layers.

    Args:
        reads: the module with the parameters, maybe wrapped.
        schedule: the `AttnResSchedule` of the config.
        tokens: which tokens the reads of this process see.
    """
    score_weights, key_norm = reads()
    key_norm = None if key_norm is None else tokens.shared(key_norm)
    return Carried(ReadWeights(tokens.shared(score_weights), key_norm, schedule))


def has_depth_reads(config: DepthAttnConfig) -> bool:
    """Return whether a model has the module `DepthReads`.

    Args:
        config: its config.
    """
    return config.connection == DepthConnectionType.ATTN_RES and not config.static_mix
