"""ReZero as a depth connection: a learned scalar on the output of every sublayer."""

from .branch_scale import ScaledBranchSite
from .configuration_depthattn import DepthAttnConfig


class ReZeroSite(ScaledBranchSite):
    """ReZero (arXiv 2003.04887; SkipInit, arXiv 2002.10444): `h_{l+1} = h_l + a_l f_l(h_l)`.

        partial (residual stream) ----> h --> sublayer --> y
            ^                                              |
            +---------- partial = partial + a * y <--------+

    The sublayer keeps the norm of the host, as in SkipInit; the paper removes it.

    I/O per sublayer and token, with the scale fused into the sum: 3 D, as much as a residual sum.

    Parameters (float32, never weight-decayed):
        branch.scale `[1]`: zero as in the paper, so that the initial network maps the embeddings to the head, or
            `branch_scale_init`; 1 is the host. The output site has none.
    """

    starts_as_host = True
    host_condition = "the scales are 1"
    tag = "rezero"
    paper = "ReZero is All You Need: [arXiv 2003.04887](https://arxiv.org/abs/2003.04887)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return "ReZero (one learned scale per sublayer)"

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site, size=1, initial_scale=0.0)
