"""LayerScale as a depth connection: a learned scale per channel on the output of every sublayer."""

from .branch_scale import ScaledBranchSite
from .configuration_depthattn import DepthAttnConfig

# Largest number of decoder layers -> initial scale; deeper models have the last value (CaiT).
_INITIAL_SCALES = ((18, 0.1), (24, 1e-5))
_DEEPEST_SCALE = 1e-6


class LayerScaleSite(ScaledBranchSite):
    """LayerScale (CaiT, arXiv 2103.17239): `h_{l+1} = h_l + diag(lambda_l) f_l(h_l)`.

        partial (residual stream) ----> h --> sublayer --> y
            ^                                              |
            +------ partial = partial + lambda * y <-------+

    I/O per sublayer and token, with the scale fused into the sum: 3 D, as much as a residual sum.

    Parameters (float32, never weight-decayed):
        branch.scale `[D]`: 0.1 with up to 18 decoder layers, 1e-5 with up to 24 and 1e-6 with more (the paper), or
            `branch_scale_init`; 1 is the host. The output site has none.
    """

    starts_as_host = True
    host_condition = "the scales are 1"
    tag = "layer-scale"
    paper = (
        "LayerScale, in Going deeper with Image Transformers: [arXiv 2103.17239](https://arxiv.org/abs/2103.17239)."
    )

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return "LayerScale (one learned scale per sublayer and channel)"

    def __init__(self, config: DepthAttnConfig, site: int):
        num_layers = config.num_sublayers // 2
        scale = next((value for depth, value in _INITIAL_SCALES if num_layers <= depth), _DEEPEST_SCALE)
        super().__init__(config, site, size=config.hidden_size, initial_scale=scale)
