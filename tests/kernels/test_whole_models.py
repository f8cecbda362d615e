"""A whole model on the Triton kernels gives what it gives on torch."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import kernel_inputs  # noqa: F401
import pytest
import torch
from model_checks import depth_model, randomise_depth
from tiny_hosts import random_ids, tiny_stock_model

from hf_depthattn import attn_res_ops, attn_res_pull_ops, moda_attention_ops, moda_depth_ops
from hf_depthattn.op_dispatch import resolve


@contextmanager
def on_kernels():
    """Every op takes its kernel; yields how often each was asked for."""
    calls = Counter()

    def forced(op, impl, *rest):
        calls[op.name] += 1
        return resolve(op, "triton", *rest)

    modules = (attn_res_ops, attn_res_pull_ops, moda_depth_ops, moda_attention_ops)
    for module in modules:
        module.resolve = forced
    try:
        yield calls
    finally:
        for module in modules:
            module.resolve = resolve


def both_ways(run) -> tuple[list, list, Counter]:
    torch.manual_seed(0)
    expected = run()
    torch.manual_seed(0)
    with on_kernels() as calls:
        actual = run()
    return actual, expected, calls


def model_with(**fields):
    torch.manual_seed(0)
    model = depth_model(tiny_stock_model("qwen3"), **fields)
    randomise_depth(model)
    return model


@pytest.mark.interpreted
def test_a_training_step_of_block_attn_res_with_gated_moda():
    """Loss and every gradient."""
    model = model_with(sublayers_per_block=2, depth_kv="attention+mlp", depth_gate="head").train()
    ids = random_ids(2, 6)
    parameters = dict(model.named_parameters())

    def step():
        loss = model(ids, labels=ids, use_cache=False).loss
        return [loss, *torch.autograd.grad(loss, parameters.values())]

    actual, expected, calls = both_ways(step)
    for name, a, b in zip(["loss", *parameters], actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    num_sites = 2 * model.config.num_hidden_layers + 1
    assert calls["attn_res_pull"] == num_sites and calls["moda_depth_forward"] == calls["moda_depth_backward"] > 0


@pytest.mark.interpreted
def test_greedy_generation_of_full_attn_res_with_moda_and_a_cache():
    model = model_with(sublayers_per_block=1, depth_kv="attention")
    ids = random_ids(1, 4)

    def generate():
        return [model.generate(ids, max_new_tokens=4, do_sample=False)]

    actual, expected, calls = both_ways(generate)
    assert torch.equal(actual[0], expected[0])
    num_sites = 2 * model.config.num_hidden_layers + 1
    assert calls["attn_res_read"] == 4 * num_sites and calls["moda_depth_forward"] > 0
