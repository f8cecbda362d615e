r"""Grouped AttnRes reads, phase 2: add the newer sources to one read of phase 1.

Paper: arXiv 2603.15031, section 3.2 and Algorithm 1. With o and lse of one read from phase 1 (`attn_res_phase1_ops`),
v_1 ... v_R the sources that phase 1 has not read, x_i their logits (`attn_res_ops`), and y the output of the previous
sublayer, not yet added to the open block v_R:

    v_R <- round(v_R + y)
    [p_0, p_1, ..., p_R] = softmax([lse, x_1, ..., x_R])
    h = read_scale (p_0 o + sum_i p_i v_i)

h equals `attn_res_read` of all sources: the parts of a softmax are merged by their log-sum-exps.
"""

import torch
from torch import Tensor

from .kernels.attn_res_group_inputs import Phase2Inputs


def attn_res_phase2(inputs: Phase2Inputs, *, impl: str = "auto") -> tuple[Tensor, tuple[Tensor, ...]]:
    """Add the newer sources to one read of phase 1 (arXiv 2603.15031, Algorithm 1, phase 2).

    Args:
        inputs: the newer sources, the score weight, the result of phase 1 and options.
        impl: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        h [..., D], and the sources, the update added to the last, for later uses: their gradients then pass through
        the backward of this op, which adds its own.

    Raises:
        ValueError: if the inputs have other shapes or dtypes.
    """
    return attn_res_phase2_reference(inputs)


def attn_res_phase2_reference(inputs: Phase2Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute `attn_res_phase2` with autograd; arguments as there."""
    sources = tuple(inputs.sources)
    if inputs.update is not None:
        sources = (*sources[:-1], sources[-1] + inputs.update)
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    weight = inputs.score_weight.to(dtype)
    values = [source.to(dtype) for source in sources]
    logits = [(v * weight).sum(-1) * torch.rsqrt(v.square().mean(-1) + inputs.eps) for v in values]
    if inputs.prior_out is not None and inputs.prior_lse is not None:
        values.insert(0, inputs.prior_out.to(dtype))
        logits.insert(0, inputs.prior_lse.view(sources[0].shape[:-1]))
    weights = torch.stack(logits).softmax(0).unsqueeze(-1)  # [R + 1, ..., 1]
    h = inputs.read_scale * sum(p * v for p, v in zip(weights.unbind(0), values, strict=True))
    return h.to(sources[0].dtype), sources
