"""The registry of depth connections.

To add a connection, write a subclass of `DepthSite` in a file of its own, and add a value of `DepthConnectionType` and
a line in `CONNECTIONS`.
"""

from .attn_res_connection import AttnResSite
from .configuration_depthattn import DepthAttnConfig
from .connection_base import DepthSite
from .deepnorm_connection import DeepNormSite
from .delta_connection import DeltaSite
from .dense_former_connection import DenseFormerSite
from .depth_options import DepthConnectionType
from .highway_connection import HighwaySite
from .hyper_connections_connection import HyperConnectionSite
from .keel_connection import KeelSite
from .layer_drop_connection import LayerDropSite
from .layer_norm_scaling_connection import LayerNormScalingSite
from .layer_scale_connection import LayerScaleSite
from .mhc_connection import MHCSite
from .mhc_lite_connection import MHCLiteSite
from .residual_connection import ResidualSite
from .rezero_connection import ReZeroSite
from .x0_lambdas_connection import X0LambdasSite

#: Config value -> class of the connection.
CONNECTIONS: dict[DepthConnectionType, type[DepthSite]] = {
    DepthConnectionType.RESIDUAL: ResidualSite,
    DepthConnectionType.ATTN_RES: AttnResSite,
    DepthConnectionType.REZERO: ReZeroSite,
    DepthConnectionType.LAYER_SCALE: LayerScaleSite,
    DepthConnectionType.LAYER_NORM_SCALING: LayerNormScalingSite,
    DepthConnectionType.DEEPNORM: DeepNormSite,
    DepthConnectionType.KEEL: KeelSite,
    DepthConnectionType.HIGHWAY: HighwaySite,
    DepthConnectionType.X0_LAMBDAS: X0LambdasSite,
    DepthConnectionType.LAYER_DROP: LayerDropSite,
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
