"""How many matrices [tokens, D] every kernel of an AttnRes read loads and stores, exactly."""

from __future__ import annotations

import pytest
import torch
from gpu_suite_tools import module
from kernel_inputs import DEVICE, EPS
from torch import Tensor

from hf_depthattn.kernels.attn_res_group_inputs import (
    Phase1GradientInputs,
    Phase1Inputs,
    Phase2GradientInputs,
    Phase2Inputs,
)
from hf_depthattn.kernels.attn_res_phase1_ops import PHASE1_TRITON
from hf_depthattn.kernels.attn_res_phase2_ops import PHASE2_TRITON

pytestmark = pytest.mark.interpreted
TOKENS, D = 18, 96
_counts = module("kernel_bytes")
metered = _counts.metered_kernels


def matrices(count: int) -> list[Tensor]:
    return [torch.randn(TOKENS, D).to(DEVICE, torch.float16) for _ in range(count)]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE) * D**-0.5


def total(launches: list) -> tuple[int, ...]:
    """Issued and distinct loads, issued and distinct stores, of all launches."""
    traffic = sum((launch.traffic(TOKENS * D) for launch in launches), _counts.NO_TRAFFIC)
    assert all(number.denominator == 1 for number in traffic), traffic
    return tuple(map(int, traffic))


def test_a_launch_is_counted_once():
    """Loads of the same address are issued more than once, but distinct once; other contexts count nothing."""
    sources = matrices(3)
    with metered() as launches:
        torch.ops.depthattn.attn_res_plain_read_triton(sources[:1] * 3, numbers(D), EPS, 1.0)
    torch.ops.depthattn.attn_res_plain_read_triton(sources, numbers(D), EPS, 1.0)
    assert [launch.name for launch in launches] == ["attn_res_read_kernel"]
    assert total(launches) == (3, 1, 1, 1)


# The carry of more than MAX_SOURCES_PER_LAUNCH sources is in float32: two matrices.
@pytest.mark.parametrize("num_sources", [1, 5, 16, 20])
def test_read(num_sources):
    sources, weight = matrices(num_sources), numbers(D)
    with metered() as forward:
        h, stats = torch.ops.depthattn.attn_res_plain_read_triton(sources, weight, EPS, 1.0)
    with metered() as backward:
        needs_grad = [True] * num_sources
        torch.ops.depthattn.attn_res_plain_read_triton_backward(h, sources, weight, stats, 1.0, needs_grad)
    is_long = num_sources > 16
    loads, stores = num_sources + 2 * is_long, 1 + 2 * is_long
    assert total(forward) == (loads, loads, stores, stores)
    # Launches of the backward: of the first 16 sources for the carry, of the last ones, and of the first 16 again.
    carry_loads, carry_stores = (4, 4) if is_long else (0, 0)
    issued, distinct = 2 * num_sources + 1 + carry_loads, num_sources + 1 + 16 * is_long + carry_loads
    stores = num_sources + carry_stores
    assert total(backward) == (issued, distinct, stores, stores)


def test_decode():
    sources, weight = matrices(9), numbers(D)
    with metered() as launches:
        torch.ops.depthattn.attn_res_plain_inference_triton(sources, weight, EPS, 1.0)
    # Groups of eight sources after the newest.
    assert [launch.name for launch in launches] == ["attn_res_decode_kernel"]
    assert total(launches) == (9, 9, 1, 1)


@pytest.mark.parametrize(
    ("num_sources", "num_reads", "num_groups"),
    [(1, 1, 1), (5, 6, 1), (9, 8, 2), (9, 16, 1), (25, 8, 4)],
)
@pytest.mark.parametrize("is_passed", [False, True], ids=["last", "passed"])
def test_phase1(num_sources, num_reads, num_groups, is_passed):
    sources, weights = matrices(num_sources), numbers(num_reads, D)
    with metered() as forward:
        _, lse, logits, rstd = PHASE1_TRITON.forward(Phase1Inputs(sources, weights, EPS))
    grads, passed = matrices(num_reads), matrices(num_sources) if is_passed else [None] * num_sources
    with metered() as backward:
        PHASE1_TRITON.backward(Phase1GradientInputs(grads, lse, passed, sources, weights, lse, logits, rstd, True))
    assert total(forward) == (2 * num_sources, num_sources, num_reads, num_reads)
    of_sources, of_weights = backward
    num_passed = num_sources if is_passed else 0
    # The gradients of the reads are loaded again for every group of sources.
    issued = 2 * (num_sources + num_groups * num_reads) + num_passed
    assert total([of_sources]) == (issued, num_sources + num_reads + num_passed, num_sources, num_sources)
    assert total([of_weights]) == (num_sources, num_sources, 0, 0)


def test_unused_reads_cost_nothing():
    sources, weights = matrices(5), numbers(6, D)
    _, lse, logits, rstd = PHASE1_TRITON.forward(Phase1Inputs(sources, weights, EPS))
    grads = [*matrices(2), None, None, None, None]
    with metered() as backward:
        PHASE1_TRITON.backward(
            Phase1GradientInputs(grads, None, [None] * 5, sources, weights, lse, logits, rstd, False)
        )
    assert total(backward) == (2 * (5 + 2), 5 + 2, 5, 5)


@pytest.mark.parametrize("num_sources", [1, 3])
@pytest.mark.parametrize("has_update", [False, True], ids=["settled", "update"])
@pytest.mark.parametrize("is_passed", [False, True], ids=["last", "passed"])
def test_phase2(num_sources, has_update, is_passed):
    sources, weight, (prior, update, grad) = matrices(num_sources), numbers(D), matrices(3)
    given = Phase2Inputs(sources, weight, EPS, 1.0, update if has_update else None, prior, numbers(TOKENS))
    with metered() as forward:
        _, newest, stats = PHASE2_TRITON.forward(given)
    sources = [*sources[:-1], newest]
    passed = matrices(num_sources) if is_passed else [None] * num_sources
    with metered() as backward:
        PHASE2_TRITON.backward(
            Phase2GradientInputs(grad, passed, sources, weight, 1.0, stats, prior, False, True, True)
        )
    loads, stores = num_sources + 1 + has_update, 1 + has_update
    assert total(forward) == (loads, loads, stores, stores)
    loads, stores = num_sources + 2 + num_sources * is_passed, num_sources + 1
    # One source stays in registers; several sources and the prior are loaded again.
    issued = loads if num_sources == 1 else loads + num_sources + 1
    assert total(backward) == (issued, loads, stores, stores)
