"""The pull kernel: the gradients of sources that several reads share."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import EPS, check_close, doubles, in_every_dtype, read_inputs
from keyword_ops import attn_res_read_reference, attn_res_read_tapped

from hf_depthattn.attn_res_pull_ops import tap
from hf_depthattn.kernels.attn_res_pull_ops import PULL_TRITON


def shared_reads(sources, weights, tap, read, options):
    tapped = [tap(source) for source in sources]
    shared = [read(tapped[: len(tapped) - i], w, eps=EPS, **options)[0] for i, w in enumerate(weights)]
    # The newest source has no direct use, the oldest one has.
    return [*shared, tapped[0]]


@pytest.mark.parametrize("shape", [(5, 24, 4), (9, 123, 3), (2, 40, 18)], ids="T{0[0]}-D{0[1]}-N{0[2]}".format)
@in_every_dtype
def test_gradients_are_those_of_separate_reads(shape, dtype):
    """Direct uses of a source included."""
    sources, weight = read_inputs(shape, dtype)
    weights = [(weight * (i + 1)).detach().requires_grad_() for i in range(3)]
    outs = shared_reads(sources, weights, tap, attn_res_read_tapped, {"impl": "triton", "read_scale": 2.0})
    assert "PulledRead" in outs[0].grad_fn.name()
    upstream = [torch.randn_like(out) for out in outs]
    grads = torch.autograd.grad(outs, [*sources, *weights], upstream)
    exact = doubles([*sources, *weights])
    expected = shared_reads(
        exact[: shape[2]], exact[shape[2] :], lambda x: x, attn_res_read_reference, {"read_scale": 2.0}
    )
    exact_grads = torch.autograd.grad(expected, exact, [x.double() for x in upstream])
    check_close("pull", dtype, [*outs[:3], *grads], [*expected[:3], *exact_grads])


@pytest.mark.interpreted
def test_opcheck():
    with torch.no_grad():
        sources, weight = read_inputs((5, 24, 3), torch.float32)
        h, stats = PULL_TRITON.read(sources, weight, EPS, 2.0)
        arguments = (h, [source.detach() for source in sources], weight.detach(), stats, 2.0)
        torch.library.opcheck(torch.ops.depthattn.attn_res_plain_coefficients_triton.default, arguments)
        coefficients, _ = PULL_TRITON.coefficients(*arguments)
        for direct in (None, sources[0].detach()):
            arguments = (sources[1].detach(), direct, [h] * 2, [weight.detach()] * 2, [coefficients] * 2, [0, 2])
            torch.library.opcheck(torch.ops.depthattn.attn_res_pull_triton.default, arguments)
