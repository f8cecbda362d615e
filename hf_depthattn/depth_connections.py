"""The registry of depth connections.

Adding a connection: one file with a subclass of `DepthSite`, one value of `DepthConnectionType`, one line in
`CONNECTIONS`.
"""

from .attn_res_connection import AttnResSite
from .configuration_depthattn import DepthAttnConfig
from .connection_base import DepthSite
from .depth_options import DepthConnectionType
from .residual_connection import ResidualSite

#: The registry: every connection by its config value.
CONNECTIONS: dict[DepthConnectionType, type[DepthSite]] = {
    DepthConnectionType.RESIDUAL: ResidualSite,
    DepthConnectionType.ATTN_RES: AttnResSite,
}

#: Leaf names of the sites in a decoder layer; PEFT's `modules_to_save` and checkpoints use them.
DEPTH_MODULES = ("attn_depth", "mlp_depth", "out_depth")


def depth_site(config: DepthAttnConfig, site: int) -> DepthSite:
    """The site module of the configured connection."""
    return CONNECTIONS[DepthConnectionType(config.connection)](config, site)
