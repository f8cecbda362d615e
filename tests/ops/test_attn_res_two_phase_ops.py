"""Two phases are the reads of a block: values and every gradient of `attn_res_read`, in torch."""

import pytest
import torch
from keyword_ops import attn_res_read_reference

from hf_depthattn.experimental.attn_res_two_phase_ops import attn_res_phase1, attn_res_phase2

EPS, NORM_EPS = 1e-3, 1e-2


@pytest.mark.parametrize("num_sources", [1, 3, 9])
@pytest.mark.parametrize("has_norm", [False, True])
def test_a_block_in_two_phases_equals_its_reads(num_sources, has_norm):
    channels, num_reads = 12, 4
    draw = {"dtype": torch.float64, "requires_grad": True}
    sources = [torch.randn(2, 5, channels, **draw) for _ in range(num_sources)]
    outputs = [torch.randn(2, 5, channels, **draw) for _ in range(num_reads)]
    queries, norm_weight = torch.randn(num_reads, channels, **draw), torch.randn(channels, **draw)
    leaves = [*sources, *outputs, queries, *([norm_weight] if has_norm else [])]
    read_scale = float(num_sources + 1)

    def two_phases():
        outs, lses = attn_res_phase1(sources, queries, eps=EPS)
        reads, partial = [], None
        for s in range(num_reads):
            first, update = (outputs[0], None) if s == 0 else (partial, outputs[s])
            h, partial = attn_res_phase2(
                first, update, outs[s], lses[s], queries[s], eps=EPS, read_scale=read_scale,
                norm_weight=norm_weight if has_norm else None, norm_eps=NORM_EPS,
            )  # fmt: skip
            reads.append(h)
        return [*reads, partial]

    def reads_one_by_one():
        reads, partial = [], None
        for s in range(num_reads):
            partial = outputs[0] if s == 0 else partial + outputs[s]
            h, _ = attn_res_read_reference([*sources, partial], queries[s], eps=EPS, read_scale=read_scale)
            if has_norm:
                h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + NORM_EPS) * norm_weight
            reads.append(h)
        return [*reads, partial]

    actual, expected = two_phases(), reads_one_by_one()
    upstream = [torch.randn_like(x) for x in expected]
    actual += torch.autograd.grad(actual, leaves, upstream)
    expected += torch.autograd.grad(expected, leaves, upstream)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("sources", "weights"),
    [([], torch.zeros(2, 4)), ([torch.zeros(3, 4)], torch.zeros(4)), ([torch.zeros(3, 4)], torch.zeros(2, 5))],
)
def test_phase1_says_what_shapes_it_takes(sources, weights):
    with pytest.raises(ValueError, match=r"`score_weights` must have the shape \[reads, D\]"):
        attn_res_phase1(sources, weights, eps=EPS)


def test_phase2_refuses_what_does_not_fit_together():
    partial, lse, weight = torch.zeros(3, 4), torch.zeros(3), torch.zeros(4)
    for arguments, message in (
        ((partial, torch.zeros(2, 4), partial, lse, weight), "`update and seq_out` must have the shape"),
        ((partial, None, partial.double(), lse, weight), "got .*torch.float64"),
        ((partial, None, partial, lse[:2], weight), "`seq_lse` and `score_weight` must have the shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            attn_res_phase2(*arguments, eps=EPS)
    with pytest.raises(ValueError, match="`sources` must have the shape"):
        attn_res_phase1([partial, partial[:2]], torch.zeros(2, 4), eps=EPS)
