"""The registry of depth connections.

To add a connection, write a subclass of `DepthSite` in a file of its own, and add a value of `DepthConnectionType` and
a line in `CONNECTIONS`.
"""

from .attn_res_connection import AttnResSite
from .configuration_depthattn import DepthAttnConfig
from .connection_base import DepthSite
from .delta_connection import DeltaSite
from .dense_former_connection import DenseFormerSite
from .depth_options import DepthConnectionType
from .hyper_connections_connection import HyperConnectionSite
from .mhc_connection import MHCSite
from .mhc_lite_connection import MHCLiteSite
from .residual_connection import ResidualSite

#: Config value -> class of the connection.
CONNECTIONS: dict[DepthConnectionType, type[DepthSite]] = {
    DepthConnectionType.RESIDUAL: ResidualSite,
    DepthConnectionType.ATTN_RES: AttnResSite,
    DepthConnectionType.HYPER_CONNECTIONS: HyperConnectionSite,
    DepthConnectionType.MHC: MHCSite,
    DepthConnectionType.MHC_LITE: MHCLiteSite,
    DepthConnectionType.DENSE_FORMER: DenseFormerSite,
    DepthConnectionType.DELTA: DeltaSite,
}

#: Names of the sites in a decoder layer, as in checkpoints and in PEFT's `modules_to_save`.
DEPTH_MODULES = ("attn_depth", "mlp_depth", "out_depth")


def connection_class(config: DepthAttnConfig) -> type[DepthSite]:
    """Return the class of the configured connection.

    Args:
        config: the model's config.
    """
    return CONNECTIONS[DepthConnectionType(config.connection)]


def depth_site(config: DepthAttnConfig, site: int) -> DepthSite:
    """Return the module of a site for the configured connection.

    Args:
        config: the model's config.
        site: sublayer number, or `config.num_sublayers` for the output site.
    """
    return connection_class(config)(config, site)
