"""A whole model on the Triton kernels gives what it gives on torch."""

from __future__ import annotations

from collections import Counter

import kernel_inputs  # noqa: F401
import pytest
import torch
from gpu_suite_tools import module
from model_checks import depth_model, randomise_depth
from tiny_hosts import random_ids, tiny_stock_model

from hf_depthattn import op_dispatch

NUM_LAYERS = 4
GROUPED = {
    "attn_res_phase1_kernel",
    "attn_res_phase1_sources_kernel",
    "attn_res_phase1_weights_kernel",
    "attn_res_phase2_kernel",
    "attn_res_phase2_backward_kernel",
    # Reads of a group without phase 1, and with several newer sources.
    "attn_res_read_kernel",
    "attn_res_read_backward_kernel",
}
MODA = {"moda_depth_forward_kernel", "moda_depth_backward_kernel"}


def both_ways(run, monkeypatch) -> tuple[list, list, Counter]:
    """Return the results of the kernels and of torch, and how often each kernel was launched."""
    torch.manual_seed(0)
    expected = run()
    for name, op in op_dispatch.OPS.items():
        if op.triton_impl is not None:
            monkeypatch.setitem(op_dispatch.OPS, name, op_dispatch.Op(name, op.triton_impl))
    torch.manual_seed(0)
    with module("kernel_bytes").metered_kernels() as launches:
        actual = run()
    return actual, expected, Counter(launch.name for launch in launches)


def model_with(**fields):
    torch.manual_seed(0)
    model = depth_model(tiny_stock_model("qwen3", num_hidden_layers=NUM_LAYERS), **fields)
    randomise_depth(model)
    return model


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("sublayers_per_block", [4, 1], ids=["block", "full"])
def test_a_training_step_of_attn_res_with_gated_moda(sublayers_per_block, is_checkpointed, monkeypatch):
    """Loss and every gradient, with a group that has no phase 1 and one that has."""
    model = model_with(
        sublayers_per_block=sublayers_per_block, depth_kv="attention+mlp", depth_gate="head", read_scale="sum"
    )
    # In float64, so that the kernels' own errors would show.
    model = model.double().train()
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    ids = random_ids(2, 6)
    parameters = dict(model.named_parameters())

    def step():
        loss = model(ids, labels=ids, use_cache=False).loss
        return [loss, *torch.autograd.grad(loss, parameters.values())]

    actual, expected, launches = both_ways(step, monkeypatch)
    for name, a, b in zip(["loss", *parameters], actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert launches.keys() == GROUPED | MODA, launches


@pytest.mark.interpreted
def test_greedy_generation_of_full_attn_res_with_moda_and_a_cache(monkeypatch):
    """With single reads, as on a GPU."""
    model = model_with(sublayers_per_block=1, depth_kv="attention")
    model.config.attn_res_schedule = "single"
    ids = random_ids(1, 4)

    def generate():
        return [model.generate(ids, max_new_tokens=4, do_sample=False)]

    actual, expected, launches = both_ways(generate, monkeypatch)
    assert torch.equal(actual[0], expected[0])
    assert launches["attn_res_decode_kernel"] == 4 * (2 * NUM_LAYERS + 1), launches
    assert launches["moda_depth_forward_kernel"] > 0
