"""MoDA's ops: values and every gradient against two oracles in float64, and what they promise to torch."""

import dataclasses
import zlib

import pytest
import torch
from keyword_ops import moda_attention, moda_attention_reference
from moda_oracles import joined_sdpa, loop_moda, masks_of_all_kinds
from tolerances import RELATIVE_RMSE, relative_rmse
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_depthattn import moda_depth_ops, op_dispatch, sequence_attention
from hf_depthattn.moda_attention_ops import ModaInputs
from hf_depthattn.moda_depth_ops import moda_depth_merge

SCALE = 0.3
# (query heads, key-value heads): groups of 1, 2, 3, 5, 6, 7, 8, 16
GROUPS = [(2, 2), (4, 2), (6, 2), (5, 1), (6, 1), (14, 2), (8, 1), (16, 1)]
# (dimension of keys, dimension of values)
HEAD_DIMS = [(8, 8), (40, 40), (80, 80), (128, 128), (256, 256), (24, 16), (16, 24), (7, 5)]
FUSED_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed(request):
    """Inputs differ from test to test and are the same in every run; a failing test prints its seed."""
    number = zlib.crc32(request.node.name.encode())
    print(f"seed {number}")
    torch.manual_seed(number)


def make_inputs(batch=2, tokens=7, heads=(4, 2), dims=(16, 16), slots=3, keys=None, dtype=torch.float64):
    """Query, key, value and lists of depth keys and values as attention modules lay them out, strided [B, H, T, d]."""

    def states(length, num_heads, dim):
        return torch.randn(batch, length, num_heads, dim, dtype=torch.float64).to(dtype).transpose(1, 2)

    (num_heads, num_kv_heads), (key_dim, value_dim) = heads, dims
    return (
        states(tokens, num_heads, key_dim),
        states(keys or tokens, num_kv_heads, key_dim),
        states(keys or tokens, num_kv_heads, value_dim),
        [states(tokens, num_kv_heads, key_dim) for _ in range(slots)],
        [states(tokens, num_kv_heads, value_dim) for _ in range(slots)],
    )


def with_gradients(function, inputs, gate=None, cotangent=None, scale=SCALE, **options):
    """Output and the gradients of every input (and the gate), with fresh leaves."""
    flat = [*inputs[:3], *inputs[3], *inputs[4]]
    leaves = [x.detach().clone().requires_grad_() for x in flat]
    num_slots = len(inputs[3])
    arguments = (*leaves[:3], leaves[3 : 3 + num_slots], leaves[3 + num_slots :])
    if gate is not None:
        gate = gate.detach().clone().requires_grad_()
        leaves.append(gate)
        options["gate"] = gate
    out = function(*arguments, scale=scale, **options)
    out = out[0] if isinstance(out, tuple) else out
    if cotangent is None:
        cotangent = torch.randn(out.shape, dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))], cotangent


def in_float64(inputs):
    return [x.double() if isinstance(x, torch.Tensor) else [y.double() for y in x] for x in inputs]


def check(inputs, seen, gate=None, oracle=loop_moda, bounds=RELATIVE_RMSE, scale=SCALE, **options):
    """The fused op against an oracle in float64 on the same (rounded) inputs."""
    dtype = inputs[0].dtype
    actual, cotangent = with_gradients(moda_attention, inputs, gate, scale=scale, **options)
    exact_gate = None if gate is None else gate.double()
    cotangent = cotangent.to(dtype).double()
    expected, _ = with_gradients(oracle, in_float64(inputs), exact_gate, cotangent, scale=scale, seen=seen)
    for x, y in zip(actual, expected, strict=True):
        assert relative_rmse(x, y) <= bounds[dtype]


def causal_seen(inputs):
    return masks_of_all_kinds(inputs[0].shape[0], inputs[0].shape[2])["causal"]


@pytest.mark.parametrize("heads", GROUPS, ids=lambda h: f"G{h[0] // h[1]}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_any_group_size_equals_loop(heads, dtype):
    inputs = make_inputs(heads=heads, dtype=dtype)
    check(inputs, causal_seen(inputs), causal=True)


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=lambda d: f"d{d[0]}-dv{d[1]}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_any_head_dim_equals_joined_sdpa(dims, dtype):
    inputs = make_inputs(dims=dims, tokens=11, dtype=dtype)
    check(inputs, causal_seen(inputs), oracle=joined_sdpa, scale=dims[0] ** -0.5, causal=True)


@pytest.mark.parametrize("kind", ["causal", "padded", "packed", "sliding"])
@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["paper", "gate"])
def test_every_mask_and_dtype_equals_loop(kind, dtype, gated):
    inputs = make_inputs(tokens=9, dtype=dtype)
    seen = masks_of_all_kinds(2, 9)[kind]
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    gate = torch.tensor([0.0, 0.4, 1.0, 1.6], dtype=gate_dtype) if gated else None
    # With a gate, gradients of the sequence pass through 16-bit intermediate results once more.
    bounds = {**RELATIVE_RMSE, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    check(inputs, seen, gate, bounds=bounds, mask=seen[:, None])


@pytest.mark.parametrize("kind", ["causal", "padded", "packed", "sliding"])
@pytest.mark.parametrize("gated", [False, True], ids=["paper", "gate"])
def test_reference_equals_loop(kind, gated):
    inputs = make_inputs(tokens=9)
    seen = masks_of_all_kinds(2, 9)[kind]
    gate = torch.tensor([0.0, 0.4, 1.0, -0.6], dtype=torch.float64) if gated else None
    actual, cotangent = with_gradients(moda_attention_reference, inputs, gate, mask=seen[:, None])
    expected, _ = with_gradients(loop_moda, inputs, gate, cotangent, seen=seen)
    for x, y in zip(actual, expected, strict=True):
        assert relative_rmse(x, y) <= 1e-14


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64], ids=str)
def test_additive_masks_mean_the_same_as_bool_ones(mask_dtype):
    inputs = make_inputs(tokens=9)
    seen = masks_of_all_kinds(2, 9)["padded"][:, None]
    additive = torch.zeros_like(seen, dtype=mask_dtype).masked_fill_(~seen, -torch.inf)
    actual, _ = moda_attention(*inputs, scale=SCALE, mask=additive)
    assert torch.equal(actual, moda_attention(*inputs, scale=SCALE, mask=seen)[0])


def test_a_token_that_sees_no_key_gets_its_slots_alone():
    inputs = make_inputs(tokens=5)
    seen = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    out, lse = moda_attention(*inputs, scale=SCALE, mask=seen)
    expected = loop_moda(*inputs, seen=seen[:, 0], scale=SCALE)
    assert relative_rmse(out, expected) <= 1e-14
    assert lse.isfinite().all()


def test_chunks_of_tokens_equal_one_piece(monkeypatch):
    inputs = make_inputs(tokens=13, slots=4, dtype=torch.float64)
    whole, cotangent = with_gradients(moda_attention, inputs, causal=True)
    monkeypatch.setattr(moda_depth_ops, "_CHUNK_ELEMENTS", 2 * 2 * 4 * 16 * 3)
    pieces, _ = with_gradients(moda_attention, inputs, cotangent=cotangent, causal=True)
    for x, y in zip(pieces, whole, strict=True):
        assert relative_rmse(x, y) <= 1e-14


def test_a_query_of_its_own_for_the_slots_has_its_own_gradient():
    inputs = make_inputs(tokens=6)
    seen = causal_seen(inputs)
    depth_query = torch.randn_like(inputs[0]).requires_grad_()
    cotangent = torch.randn(2, 6, 4, 16, dtype=torch.float64)
    results = []
    for function, options in ((moda_attention, {"causal": True}), (loop_moda, {"seen": seen})):
        query = inputs[0].detach().clone().requires_grad_()
        out = function(query, *inputs[1:], scale=SCALE, depth_query=depth_query, **options)
        out = out[0] if isinstance(out, tuple) else out
        results.append((out, *torch.autograd.grad(out, (query, depth_query), cotangent)))
    for x, y in zip(*results, strict=True):
        assert relative_rmse(x, y) <= 1e-14


def test_gate_zero_is_attention_over_the_sequence_bit_for_bit():
    inputs = make_inputs(tokens=33, dtype=torch.float32)
    out, _ = moda_attention(*inputs, scale=SCALE, causal=True, gate=torch.zeros(4))
    query, key, value = inputs[:3]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)
    assert torch.equal(out, expected.transpose(1, 2))


def test_a_closed_gate_has_a_gradient_at_once():
    gradients, _ = with_gradients(moda_attention, make_inputs(), torch.zeros(4), causal=True)
    assert (gradients[-1] != 0).all()
    assert all(not gradient.any() for gradient in gradients[4:-1]), "slots learn once the gate has moved"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_gate_of_one_is_the_paper_where_slots_hold_nearly_all_weight(dtype):
    inputs = make_inputs(tokens=9, dtype=dtype)
    inputs[3][0] = 12 * inputs[0].unflatten(1, (2, 2)).mean(2)  # a slot that every query of the group likes
    ungated, cotangent = with_gradients(moda_attention, inputs, scale=1.0, causal=True)
    gate = torch.ones(4, dtype=dtype)
    gated, _ = with_gradients(moda_attention, inputs, gate, cotangent, scale=1.0, causal=True)
    for x, y in zip(gated, ungated, strict=False):
        assert relative_rmse(x, y.double()) <= 10 * RELATIVE_RMSE[dtype]


@pytest.mark.parametrize("function", [moda_attention, moda_attention_reference])
def test_causal_with_cached_keys_ends_at_the_last_key(function):
    inputs = make_inputs(tokens=4, keys=11)
    seen = torch.ones(4, 11, dtype=torch.bool).tril(7).repeat(2, 1, 1)
    out, *_ = function(*inputs, scale=SCALE, causal=True)
    assert relative_rmse(out, loop_moda(*inputs, seen=seen, scale=SCALE)) <= 1e-14


def test_autocast_does_not_reach_into_the_op():
    inputs = make_inputs(tokens=9, dtype=torch.float32)
    expected, cotangent = with_gradients(moda_attention, inputs, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, _ = with_gradients(moda_attention, inputs, cotangent=cotangent, causal=True)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


# --- the merge that must be impossible ---


def merged_by_autograd(query, key, value, depth_keys, depth_values, scale):
    """Sequence part by torch's kernel, whose log-sum-exp has no gradient, merged with plain autograd."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    seq_out, seq_lse = flash(query, key, value, 0.0, True, scale=scale)
    group = query.shape[1] // key.shape[1]
    logits = [scale * (query * k.repeat_interleave(group, 1)).sum(-1) for k in depth_keys]
    lse = torch.logsumexp(torch.stack([seq_lse, *logits], -1), -1)
    out = (seq_lse - lse).exp()[..., None] * seq_out
    for logit, v in zip(logits, depth_values, strict=True):
        out = out + (logit - lse).exp()[..., None] * v.repeat_interleave(group, 1)
    return out.transpose(1, 2)


def test_a_naive_merge_gives_wrong_gradients_that_these_tests_see():
    inputs = make_inputs(tokens=9)
    wrong, cotangent = with_gradients(merged_by_autograd, inputs)
    right, _ = with_gradients(loop_moda, inputs, cotangent=cotangent, seen=causal_seen(inputs))
    errors = [relative_rmse(x, y) for x, y in zip(wrong, right, strict=True)]
    assert errors[0] <= 1e-14, "the output is right, which is the trap"
    assert min(errors[1], errors[2]) > 0.05, "gradients of query and key are not"


def test_merging_a_log_sum_exp_without_gradient_is_refused():
    query, key, value, depth_keys, depth_values = make_inputs()
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(query.requires_grad_(), key, value, 0.0, True)
    with pytest.raises(ValueError, match="`seq_lse` has no gradient"):
        moda_depth_merge(query, depth_keys, depth_values, out, lse, scale=SCALE)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_merge_with_a_differentiable_log_sum_exp_equals_the_reference(softcap, dtype):
    inputs = make_inputs(tokens=9, dtype=dtype)

    def merged(query, key, value, depth_keys, depth_values, scale):
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        logits = scale * query @ key.mT
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        logits = logits.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
        seq_out, seq_lse = logits.softmax(-1) @ value, logits.logsumexp(-1)
        return moda_depth_merge(query, depth_keys, depth_values, seq_out, seq_lse, scale=scale, softcap=softcap)

    actual, cotangent = with_gradients(merged, inputs)
    expected, _ = with_gradients(
        moda_attention_reference,
        in_float64(inputs),
        cotangent=cotangent.to(dtype).double(),
        causal=True,
        softcap=softcap,
    )
    for x, y in zip(actual, expected, strict=True):
        assert relative_rmse(x, y) <= RELATIVE_RMSE[dtype]


# --- the reference's options, which only eager attention has ---


def test_sinks_take_part_in_the_softmax_without_a_value():
    inputs = make_inputs(tokens=5)
    sinks = torch.randn(4, dtype=torch.float64)
    out, weights, slot_weights = moda_attention_reference(*inputs, scale=SCALE, causal=True, sinks=sinks)
    # A sink is a slot with the logit s and the value 0: build that slot.
    query = inputs[0]
    norm = query.square().sum(-1, keepdim=True)
    per_head = [query[:, h : h + 1] * sinks[h] / SCALE / norm[:, h : h + 1] for h in range(4)]
    for head in range(4):
        kv = head // 2
        one_head = (
            query[:, head : head + 1],
            *(x[:, kv : kv + 1] for x in inputs[1:3]),
            [*(x[:, kv : kv + 1] for x in inputs[3]), per_head[head]],
            [*(x[:, kv : kv + 1] for x in inputs[4]), torch.zeros_like(per_head[head])],
        )
        expected = loop_moda(*one_head, seen=causal_seen(inputs), scale=SCALE)
        assert relative_rmse(out[:, :, head : head + 1], expected) <= 1e-14
    assert ((weights.sum(-1) + slot_weights.sum(-1)) < 1).all()


def test_dropout_of_weights_keeps_the_expectation():
    inputs = make_inputs(tokens=4, dtype=torch.float32)
    exact, _, _ = moda_attention_reference(*inputs, scale=SCALE, causal=True)
    draws = [moda_attention_reference(*inputs, scale=SCALE, causal=True, dropout=0.3)[0] for _ in range(2000)]
    assert not torch.equal(draws[0], draws[1])
    assert relative_rmse(torch.stack(draws).mean(0), exact.double()) <= 0.05


# --- what torch expects of ops ---


def test_opcheck():
    for gate, depth_query in ((None, False), (torch.rand(4), True)):
        inputs = make_inputs(tokens=5, dtype=torch.float32)
        query, key, value = (x.requires_grad_() for x in inputs[:3])
        slots = [[x.requires_grad_() for x in part] for part in inputs[3:]]
        gate = None if gate is None else gate.requires_grad_()
        other_query = torch.randn_like(query).requires_grad_() if depth_query else None
        given = ModaInputs(query, key, value, *slots, SCALE, depth_query=other_query, causal=True, gate=gate)
        torch.library.opcheck(torch.ops.depthattn.moda_fused_attention, (*given, "flash_cpu", "auto"))
    seq_out, seq_lse = torch.randn(2, 4, 5, 16).requires_grad_(), torch.randn(2, 4, 5).requires_grad_()
    arguments = (query, *slots, seq_out, seq_lse, SCALE, 0.0, "auto")
    torch.library.opcheck(torch.ops.depthattn.moda_depth_merge, arguments)


@pytest.mark.parametrize("gated", [False, True], ids=["paper", "gate"])
def test_compiles_to_one_graph(gated):
    inputs = make_inputs(tokens=6, dtype=torch.float32)
    gate = torch.rand(4) if gated else None
    compiled = torch.compile(moda_attention, fullgraph=True, backend="aot_eager")
    expected, cotangent = with_gradients(moda_attention, inputs, gate, causal=True)
    actual, _ = with_gradients(compiled, inputs, gate, cotangent, causal=True)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_runs_on_fake_cuda_tensors_and_picks_the_gpu_kernels():
    def states(num_heads):
        return torch.empty(2, 32, num_heads, 16, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

    with FakeTensorMode():
        inputs = (states(4), states(2), states(2), [states(2)] * 3, [states(2)] * 3)
        query = inputs[0]
        assert sequence_attention.find_kernel(query, None, None) == "flash_cuda"
        assert sequence_attention.find_kernel(query, None, 8) == "flash_cuda"
        mask = torch.ones(2, 1, 32, 32, dtype=torch.bool, device="cuda")
        assert sequence_attention.find_kernel(query, mask, None) == "efficient_cuda"
        assert sequence_attention.find_kernel(query.float(), None, None) == "efficient_cuda"
        assert sequence_attention.find_kernel(query.double(), None, None) is None
        out, _ = moda_attention(*inputs, scale=SCALE, causal=True)
        assert out.shape == (2, 32, 4, 16) and out.device.type == "cuda"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", [sequence_attention.FlashCUDA, sequence_attention.EfficientCUDA])
def test_gpu_kernels_accept_what_they_are_handed(kernel, masked):
    """Their own shape functions see every argument, forward and backward."""
    is_flash = kernel is sequence_attention.FlashCUDA
    dtype = torch.bfloat16 if is_flash else torch.float32
    states = [torch.empty(2, 35, h, 16, dtype=dtype, device="meta").transpose(1, 2) for h in (4, 2, 2)]
    mask = torch.ones(2, 1, 35, 35, dtype=torch.bool, device="meta") if masked and not is_flash else None
    window = 8 if masked and is_flash else None
    inputs = sequence_attention.SequenceInputs(*states, mask, mask is None, SCALE, window)
    out, lse = kernel.forward(inputs)
    assert out.shape == (2, 4, 35, 16) and lse.shape == (2, 4, 35) and lse.dtype == torch.float32
    gradients = kernel.backward(out, inputs, out, lse)
    assert [x.shape for x in gradients] == [x.shape for x in states]


def test_the_depth_part_goes_through_the_one_resolve_function(monkeypatch):
    """The seam for Triton: both directions, both ops, and an explicit wish is never ignored."""
    calls = []

    def spy(name, torch_impl):
        def run(*arguments):
            calls.append(name)
            return torch_impl(*arguments)

        return run

    for op, name in ((moda_depth_ops.MODA_DEPTH_FORWARD, "forward"), (moda_depth_ops.MODA_DEPTH_BACKWARD, "backward")):
        row = dataclasses.replace(op, triton_impl=spy(name, op.torch_impl), limit=None)
        monkeypatch.setitem(op_dispatch.OPS, op.name, row)
    monkeypatch.setattr(op_dispatch, "_HAS_TRITON", True)
    inputs = make_inputs()
    with_gradients(moda_attention, inputs, causal=True)
    assert not calls, "a CPU takes the torch path"
    with_gradients(moda_attention, inputs, causal=True, impl="triton")
    assert calls == ["forward", "backward"]
    row = dataclasses.replace(moda_depth_ops.MODA_DEPTH_FORWARD, triton_impl=None)
    monkeypatch.setitem(op_dispatch.OPS, row.name, row)
    with pytest.raises(RuntimeError, match="no Triton implementation of 'moda_depth_forward'"):
        moda_attention(*inputs, scale=SCALE, causal=True, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": (5, 2)}, "divides the 5"),
        ({"slot_shape": True}, "`depth_keys` must have the shape"),
        ({"missing_value": True}, "3 `depth_keys` but 2 `depth_values`"),
        ({"gate": torch.zeros(3)}, r"`gate` must have the shape \(4,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    inputs = list(make_inputs(heads=change.get("heads", (4, 2))))
    if "slot_shape" in change:
        inputs[3][1] = inputs[3][1][:, :, :-1]
    if "missing_value" in change:
        inputs[4].pop()
    for function in (moda_attention, moda_attention_reference):
        with pytest.raises(ValueError, match=message):
            function(*inputs, scale=SCALE, causal=True, gate=change.get("gate"))
