"""The pull backward equals autograd's own, runs where it should, and steps aside where it cannot."""

import dataclasses
from functools import partial

import pytest
import torch
from keyword_ops import attn_res_read, attn_res_read_reference, attn_res_read_tapped
from model_checks import depth_model, randomise_depth
from tiny_hosts import random_ids, tiny_stock_model

from hf_depthattn import attn_res_connection, attn_res_pull_ops, op_dispatch
from hf_depthattn.attn_res_pull_ops import tap

EPS = 1e-6


@pytest.fixture
def pulled(monkeypatch):
    """Numbers of reads behind each pull, in the order they ran."""
    counts = []

    def pull(source, direct, grads, *rest):
        counts.append(len(grads))
        return attn_res_pull_ops._pull_torch(source, direct, grads, *rest)

    op = attn_res_pull_ops.ATTN_RES_PULL
    spied = dataclasses.replace(op, torch_impl=op.torch_impl._replace(pull=pull))
    monkeypatch.setitem(op_dispatch.OPS, op.name, spied)
    return counts


def leaves(num_sources, tokens=5, channels=12, dtype=torch.float64):
    return [torch.randn(2, tokens, channels, dtype=dtype, requires_grad=True) for _ in range(num_sources)]


def network(sources, weights, read, tap):
    """Every read feeds the next source, and every source is used directly too."""
    tapped, total = [tap(sources[0])], 0
    for source, weight in zip(sources[1:], weights, strict=True):
        h, _ = read(tapped, weight, eps=EPS, read_scale=float(len(tapped)))
        tapped.append(tap(source + h.tanh()))
        total = total + (tapped[-1] * h).mean()
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_separate_reads(dtype, pulled):
    # One draw in six has a gradient too near zero for bfloat16.
    torch.manual_seed(0)
    sources = leaves(6, dtype=dtype)
    weights = [torch.randn(12, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True) for _ in range(5)]
    wanted = [x.detach().double().requires_grad_() for x in (*sources, *weights)]
    gradients = torch.autograd.grad(network(sources, weights, attn_res_read_tapped, tap), [*sources, *weights])
    assert pulled == [1, 2, 3, 4, 5], "every source but the last, newest first"
    loss = network(wanted[:6], wanted[6:], attn_res_read_reference, lambda source: source)
    expected = torch.autograd.grad(loss, wanted)
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    for actual, exact in zip(gradients, expected, strict=True):
        assert (actual - exact).norm() <= bound * exact.norm()


def test_a_backward_that_ended_early_leaves_nothing_for_the_next(pulled):
    sources, weights = leaves(4), [torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    loss = network(sources, weights, attn_res_read_tapped, tap)
    everything = [*sources, *weights]
    whole = torch.autograd.grad(loss, everything, retain_graph=True)
    torch.autograd.grad(loss, weights[-1:], retain_graph=True)
    torch.autograd.grad(loss, sources[-1:], retain_graph=True)
    again = torch.autograd.grad(loss, everything)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_a_backward_within_a_backward_does_not_disturb_it(pulled):
    sources, weights = leaves(4), [torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    everything, inner = [*sources, *weights], []
    loss = network(sources, weights, attn_res_read_tapped, tap)
    alone = torch.autograd.grad(loss, everything, retain_graph=True)

    def run_inner(_):
        if not inner:
            inner.append(None)
            inner.extend(torch.autograd.grad(loss, everything, retain_graph=True))

    weights[1].register_hook(run_inner)
    outer = torch.autograd.grad(loss, everything, retain_graph=True)
    assert pulled == [1, 2, 3, 1, 1, 2, 3, 2, 3], "the first tap of the outer pass had run"
    for gradients in (inner[1:], outer):
        assert all(torch.equal(a, b) for a, b in zip(gradients, alone, strict=True))


def test_an_unfinished_backward_keeps_no_memory(pulled):
    sources, weights = leaves(3), [torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    tapped = [tap(source) for source in sources]
    h, _ = attn_res_read_tapped(tapped, weights[0], eps=EPS)
    torch.autograd.grad(h.sum(), weights[:1], retain_graph=True)
    assert not pulled and not any(source.grad_fn.depth_readers for source in tapped)


def test_frozen_sources_and_unused_reads(pulled):
    sources = leaves(3)
    sources[0].requires_grad_(False)
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)
    tapped = [tap(source) for source in sources]
    assert tapped[0] is sources[0]
    h, _ = attn_res_read_tapped(tapped, weight, eps=EPS)
    attn_res_read_tapped(tapped, weight, eps=EPS)
    gradients = torch.autograd.grad(h.square().sum(), [*sources[1:], weight])
    assert pulled == [1, 1]
    expected, _ = attn_res_read(sources, weight, eps=EPS)
    wanted = torch.autograd.grad(expected.square().sum(), [*sources[1:], weight])
    for actual, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(actual, exact)


def test_a_source_that_lost_its_tap_is_read_as_usual(pulled):
    sources, weight = leaves(3), torch.randn(12, dtype=torch.float64, requires_grad=True)
    tapped = [tap(source) for source in sources]
    # As a hook that moves or wraps the inputs of a layer does.
    tapped[1] = tapped[1] * 1.0
    h, _ = attn_res_read_tapped(tapped, weight, eps=EPS)
    gradients = torch.autograd.grad(h.square().sum(), sources)
    assert not pulled
    wanted = torch.autograd.grad(attn_res_read(sources, weight, eps=EPS)[0].square().sum(), sources)
    for actual, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(actual, exact)


def test_hooks_and_kept_gradients_see_the_whole_gradient(pulled):
    sources, weight = leaves(2), torch.randn(12, dtype=torch.float64, requires_grad=True)
    results = []
    for read, wrap in ((attn_res_read_tapped, tap), (attn_res_read, lambda source: source * 1.0)):
        seen = []
        tapped = [wrap(source) for source in sources]
        tapped[0].retain_grad()
        tapped[1].register_hook(seen.append)
        h, _ = read(tapped, weight, eps=EPS)
        h.square().sum().backward()
        results.append([tapped[0].grad, *seen])
    assert not pulled
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual, exact)


def test_no_taps_without_gradients_and_under_functional_transforms(pulled):
    (source,) = leaves(1)
    with torch.no_grad():
        assert tap(source) is source
    assert tap(source.detach()).grad_fn is None
    weight = torch.randn(12, dtype=torch.float64)

    def loss(x):
        return attn_res_read_tapped([tap(x), tap(2 * x)], weight, eps=EPS, activation="sigmoid")[0].sum()

    wanted = torch.autograd.grad(loss(source), source)[0]
    torch.testing.assert_close(torch.func.grad(loss)(source.detach()), wanted)
    assert not pulled


def loss_and_gradients(model, ids):
    loss = model(ids, labels=ids, use_cache=False).loss
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss, dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("sublayers_per_block", [1, 2])
def test_a_model_trains_by_pull(sublayers_per_block, checkpointing, pulled, monkeypatch):
    model = depth_model(tiny_stock_model("llama").double(), sublayers_per_block=sublayers_per_block).train()
    randomise_depth(model)
    ids = random_ids(2, 9)
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss, gradients = loss_and_gradients(model, ids)
    num_sites = 2 * model.config.num_hidden_layers + 1
    # The embedding and every write are tapped and read.
    assert len(pulled) == num_sites
    monkeypatch.setattr(attn_res_connection, "tap", lambda source: source)
    del pulled[:]
    expected_loss, expected = loss_and_gradients(model, ids)
    assert not pulled and loss == expected_loss
    for name, exact in expected.items():
        torch.testing.assert_close(gradients[name], exact, rtol=1e-9, atol=1e-12, msg=partial("{}: {}".format, name))


def test_a_layer_called_again_with_a_detached_state_has_its_gradients(pulled):
    """Tools that rerun one layer get the gradients of its inputs, not silence."""
    model = depth_model(tiny_stock_model("llama").double(), sublayers_per_block=2).train()
    randomise_depth(model)
    captured = {}
    layer = model.model.layers[1]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    model(random_ids(1, 5), use_cache=False)
    handle.remove()
    state = captured["args"][0]
    inputs = [x.detach().requires_grad_() for x in (*state.sources, state.partial)]
    state = state._replace(sources=tuple(inputs[:-1]), partial=inputs[-1])
    out = layer(state, **captured["kwargs"])
    out = out if isinstance(out, torch.Tensor) else out.partial
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(out.sum(), inputs))


def test_parameters_may_change_within_backward(pulled):
    """An optimizer that steps within backward has changed a read's weight before its sources' gradients are formed."""

    def step(weight):
        weight.data.mul_(5)

    gradients = []
    for hook in (lambda weight: None, step):
        torch.manual_seed(0)
        sources, weights = leaves(3), [torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        for weight in weights:
            weight.register_post_accumulate_grad_hook(hook)
        network(sources, weights, attn_res_read_tapped, tap).backward()
        gradients.append([x.grad for x in (*sources, *weights)])
    assert pulled == [1, 2] * 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_backward_under_autocast_is_not_rounded(pulled):
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        sources = leaves(4, dtype=torch.float32)
        weights = [torch.randn(12, requires_grad=True) for _ in range(3)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            network(sources, weights, attn_res_read_tapped, tap).backward()
        gradients.append([x.grad for x in (*sources, *weights)])
    assert pulled == [1, 2, 3] * 2
    for exact, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, exact)


def test_second_derivatives_are_refused(pulled):
    """Not taken for zero: the gradient of a source that is only read comes from no incoming gradient."""
    sources, weight = leaves(2), torch.randn(12, dtype=torch.float64, requires_grad=True)
    h, _ = attn_res_read_tapped([tap(source) for source in sources], weight, eps=EPS)
    gradients = torch.autograd.grad(h.sum(), [*sources, weight], create_graph=True)
    assert pulled == [1, 1]
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="no second derivatives"):
            gradient.square().sum().backward(retain_graph=True)
