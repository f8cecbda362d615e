"""MoDA in a whole model: against a decoder written out by hand, alone and with AttnRes, on every CPU backend."""

import copy
import itertools
import weakref
from types import SimpleNamespace

import moda_released
import pytest
import torch
from moda_oracles import masks_of_all_kinds
from moda_slow_model import SlowModel
from model_checks import depth_model, randomise_depth, relative_max_error
from tiny_hosts import random_ids, tiny_stock_model

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM, moda_attention, sequence_attention

KEY_RULES = list(itertools.product(("same_position", "none"), ("writer", "reader")))
CONNECTIONS = {
    "alone": {"connection": "residual"},
    "full": {"connection": "attn_res", "sublayers_per_block": 1},
    "block": {"connection": "attn_res", "sublayers_per_block": 2},
    "block-sum": {"connection": "attn_res", "sublayers_per_block": 3, "read_scale": "sum"},
}


def moda_model(model_type="llama", dtype=torch.float64, host=None, **fields):
    model = depth_model(tiny_stock_model(model_type, dtype, **(host or {})), **{"depth_kv": "attention+mlp", **fields})
    randomise_depth(model)
    return model


def check_against_slow_model(model, tolerance=1e-12):
    ids = random_ids(2, 6)
    positions = torch.arange(6).repeat(2, 1)
    with torch.no_grad():
        actual = model(ids).logits
    expected = SlowModel(model).logits(ids, positions, masks_of_all_kinds(2, 6)["causal"])
    assert relative_max_error(actual, expected) <= tolerance


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize(("rope", "norm"), KEY_RULES)
def test_key_rules_equal_the_slow_model(model_type, rope, norm):
    # Norms of hosts compute in float32, so float64 agrees to that only where they are.
    model = moda_model(model_type, connection="residual", depth_key_rope=rope, depth_key_norm=norm)
    check_against_slow_model(model, tolerance=3e-6)


@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize(
    "fields",
    [
        {"depth_kv": "attention"},
        {"depth_kv": "attention+mlp"},
        {"depth_gate": "head"},
        {"num_depth_slots": 1},
        {"num_depth_slots": 3, "depth_gate": "head"},
        {"depth_kv": "attention", "num_depth_slots": 1},
        {"depth_slots": [[], [0], [0, 3]]},
        {"depth_slots": [[], [], [1, 2]], "depth_gate": "head", "depth_kv_bias": True},
        {"depth_kv": "attention", "depth_slots": [[], [0], [2]]},
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values()),
)
def test_options_alone_and_with_attn_res_equal_the_slow_model(connection, fields):
    check_against_slow_model(moda_model(**CONNECTIONS[connection], **fields), tolerance=3e-6)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_post_norm_equals_the_slow_model(model_type):
    for depth_kv in (None, "attention+mlp"):
        check_against_slow_model(
            moda_model(model_type, connection="residual", norm_position="post", depth_kv=depth_kv), tolerance=3e-6
        )


def test_a_slot_is_dropped_after_its_last_reader():
    """Slots of attention 0, MLP 0 and MLP 2 are written; that of attention 0 is freed before layer 3 runs."""
    fields = {"connection": "residual", "depth_slots": [[], [0, 1], [1], [], [5]]}
    model = moda_model(dtype=torch.float32, host={"num_hidden_layers": 5}, **fields)
    numbers, first, alive = [], [], []

    def see(layer, args, kwargs):
        keys = args[0].depth_keys
        numbers.append(len(keys))
        if layer.layer_idx == 1:
            first.append(weakref.ref(keys[0]))
        alive.extend(seen() is not None for seen in first)

    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        model(random_ids(2, 6), use_cache=False)
    assert numbers == [2, 1, 1, 1]
    assert alive == [True, False, False, False]


def test_biases_of_a_new_model_are_zero():
    config = DepthAttnConfig.moda(tiny_stock_model("llama").config, depth_kv_bias=True)
    biases = [p for name, p in DepthAttnForCausalLM(config).named_parameters() if name.endswith("_proj.bias")]
    assert len(biases) == 4 and not any(bias.any() for bias in biases)


def test_the_released_language_model_is_represented_exactly():
    """Golden logits of the released code, with the biases of its projections and of its host."""
    model = DepthAttnForCausalLM(moda_released.config()).double().eval()
    result = model.load_state_dict(moda_released.state_dict(), strict=True)
    assert not result.missing_keys
    with torch.no_grad():
        logits = model(torch.tensor(moda_released.IDS)).logits
    # The host's norms and rotation compute in float32.
    assert relative_max_error(logits[0, [0, 3, 7], :4], torch.tensor(moda_released.LOGITS).double()) <= 1e-6
    assert logits.norm().item() == pytest.approx(moda_released.NORM, rel=1e-6)


@pytest.mark.parametrize("connection", ["alone", "block"])
def test_padding_and_packing_equal_the_slow_model(connection):
    model = moda_model(**CONNECTIONS[connection])
    ids = random_ids(2, 9)
    masks = masks_of_all_kinds(2, 9)
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, :3] = 0
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    packed_positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3]).repeat(2, 1)
    slow = SlowModel(model)
    with torch.no_grad():
        padded = model(ids, attention_mask=padding, position_ids=positions).logits
        packed = model(ids, position_ids=packed_positions, use_cache=False).logits
    real = padding.bool()
    assert relative_max_error(padded[real], slow.logits(ids, positions, masks["padded"])[real]) <= 3e-6
    assert relative_max_error(packed, slow.logits(ids, packed_positions, masks["packed"])) <= 3e-6


@pytest.mark.parametrize("gate", [None, "head"], ids=["paper", "gate"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "deepseek_v3", "kimi_linear"])
def test_sdpa_and_eager_agree_in_loss_and_every_gradient(model_type, gate):
    model = moda_model(model_type, torch.float32, connection="attn_res", num_blocks=3, depth_gate=gate).train()
    ids = random_ids(2, 12)
    padding = torch.ones(2, 12, dtype=torch.long)
    # Linear attention lets padding through, where sdpa and eager differ on the stock host as well.
    num_padding = 0 if model_type == "kimi_linear" else 3
    padding[0, :num_padding] = 0
    labels = ids.clone()
    labels[0, : num_padding + 1] = -100  # the first real token is predicted from padding
    results = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        out = model(ids, attention_mask=padding, labels=labels)
        out.loss.backward()
        results.append(
            (out.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        )
    (loss, gradients), (expected_loss, expected_gradients) = results
    assert torch.allclose(loss, expected_loss, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 1e-4 * expected_gradients[
            name
        ].norm() + 1e-6 * largest, name


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("gate", [None, "head"], ids=["paper", "gate"])
def test_flex_attention_equals_eager(model_type, gate):
    """On a CPU torch's flex attention gives no gradients, so the forward alone."""
    model = moda_model(model_type, torch.float32, connection="residual", depth_gate=gate)
    ids = random_ids(2, 12)
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[0, :3] = 0
    logits = []
    with torch.no_grad():
        for implementation in ("flex_attention", "eager"):
            model.set_attn_implementation(implementation)
            out = model(ids, attention_mask=padding, output_depth_attentions=True)
            logits.append((out.logits[padding.bool()], out.depth_kv_attentions[-1].transpose(1, 2)[padding.bool()]))
    for x, y in zip(*logits, strict=True):
        assert relative_max_error(x, y) <= 2e-6


class DenseFlash(sequence_attention.FlashCPU):
    """Stands for the GPU's flash kernel: no mask, windows, and a causal mask that ends at the last key."""

    aligns_last_query = True
    calls: list = []

    @staticmethod
    def supports(query, mask, window):
        return mask is None

    @staticmethod
    def forward(inputs):
        query, num_keys = inputs.query, inputs.key.shape[2]
        DenseFlash.calls.append((query.shape[2], num_keys, inputs.window))
        seen = moda_attention._dense_mask(
            None, None, query.shape[2], num_keys, inputs.causal, inputs.window, query.device
        )
        return sequence_attention.FlashCPU.forward(inputs._replace(mask=seen, causal=False, window=None))


@pytest.fixture
def flash_model(monkeypatch):
    """Makes a model under flash attention whose kernels run on a CPU, and the same one under eager attention."""

    def make(window=None, has_flash_kernel=True):
        kernels = {"dense_flash": DenseFlash} if has_flash_kernel else {}
        kernels["flash_cpu"] = sequence_attention.FlashCPU
        monkeypatch.setattr(sequence_attention, "KERNELS", kernels)
        DenseFlash.calls.clear()
        host = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0} if window else {}
        model = moda_model("qwen2", torch.float32, host=host, connection="residual")
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        # Past transformers' check that the package `flash_attn` is there; masks are made as for flash attention.
        for config in (model.config, model.config.text_config):
            monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
        return model, eager

    return make


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("has_flash_kernel", [True, False], ids=["flash", "other-kernels"])
def test_flash_attention_plumbing_equals_eager(window, has_flash_kernel, flash_model):
    """The kernels need a GPU; the function in front of them does not. Plain, padded and packed batches."""
    model, eager = flash_model(window, has_flash_kernel)
    ids, padding = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    padding[0, :3] = 0
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    with torch.no_grad():
        assert relative_max_error(model(ids).logits, eager(ids).logits) <= 2e-6
        assert bool(DenseFlash.calls) == has_flash_kernel
        assert all(call == (9, 9, window) for call in DenseFlash.calls)
        DenseFlash.calls.clear()
        actual, expected = (m(ids, attention_mask=padding).logits[padding.bool()] for m in (model, eager))
        assert relative_max_error(actual, expected) <= 2e-6
        actual, expected = (m(ids[:1], position_ids=packed, use_cache=False).logits for m in (model, eager))
        assert relative_max_error(actual, expected) <= 2e-6
        assert not DenseFlash.calls, "masks are for other kernels"


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("has_flash_kernel", [True, False], ids=["flash", "other-kernels"])
def test_flash_attention_with_a_cache_equals_eager_without(window, chunk, has_flash_kernel, flash_model):
    model, eager = flash_model(window, has_flash_kernel)
    ids = random_ids(2, 11)
    with torch.no_grad():
        expected = eager(ids, use_cache=False).logits
        cache, parts = None, []
        for part in ids.split(chunk, dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert relative_max_error(torch.cat(parts, 1), expected) <= 2e-6


@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
@pytest.mark.parametrize("implementation", ["sdpa", "flash", "flash without its kernel"])
def test_kernels_are_asked_once_per_attention(implementation, masked, flash_model, monkeypatch):
    """One round of questions per forward of a layer (under sdpa, of one that reads slots), and none in backward."""
    if implementation == "sdpa":
        model = moda_model("qwen2", torch.float32, connection="residual")
    else:
        model, _ = flash_model(4, has_flash_kernel=implementation == "flash")
    asked = []

    def spied(name, kernel):
        class Spied(kernel):
            @staticmethod
            def supports(*arguments):
                asked.append(name)
                return kernel.supports(*arguments)

        return Spied

    kernels = {name: spied(name, kernel) for name, kernel in sequence_attention.KERNELS.items()}
    monkeypatch.setattr(sequence_attention, "KERNELS", kernels)
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, :3] = 0
    out = model(random_ids(2, 9), attention_mask=padding if masked else None, use_cache=False).logits
    num_read = model.config.depth_slot_plan.num_read
    calls = sum(slots > 0 for slots in num_read) if implementation == "sdpa" else len(num_read)
    # Kernels are asked in order, until one supports the inputs; the flash kernel supports no masks.
    one_round = {"flash": ["dense_flash", "flash_cpu"] if masked else ["dense_flash"], "sdpa": ["ring", "flash_cpu"]}
    expected = one_round.get(implementation, ["flash_cpu"]) * calls
    assert asked == expected and calls >= 1
    if implementation != "flash" or masked:  # the stand-in of the flash kernel has no backward
        out.square().mean().backward()
        assert asked == expected


def test_dropout_under_flash_attention_keeps_the_window():
    exchange = SimpleNamespace(keys=(), values=(), gate=None, to_depth_query=None, return_weights=False)
    module = SimpleNamespace(is_causal=True, modules=lambda: [torch.nn.Linear(1, 1)], config=SimpleNamespace())
    states = [torch.randn(1, 2, 12, 8) for _ in range(3)]
    call = moda_attention.AttentionCall(module, *states, None, exchange, dropout=1e-12, scaling=0.3)
    out, _ = moda_attention._flash(call, sliding_window=4)
    ones = torch.ones(12, 12, dtype=torch.bool)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(*states, attn_mask=ones.tril() & ~ones.tril(-4), scale=0.3).transpose(1, 2)
    assert relative_max_error(out, expected) <= 1e-5


@pytest.mark.parametrize("model_type", ["qwen3", "olmo2"])
def test_scaled_rotations_give_the_same_logits_under_either_key_rule(model_type):
    """YaRN scales query and key: with unrotated keys the query has to carry both scales."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.5}
    yarn["original_max_position_embeddings"] = 32
    model = moda_model(model_type, torch.float32, host={"rope_parameters": yarn}, connection="residual")
    reader = copy.deepcopy(model)
    for m in (model, reader):
        for name, parameter in m.named_parameters():
            if "k_norm" in name:
                torch.nn.init.ones_(parameter)
    for layer in reader.model.layers:
        layer.depth_kv.reader_norms, layer.depth_kv.stores_rotated, layer.depth_kv.unrotates_query = True, False, True
    ids = random_ids(2, 7)
    with torch.no_grad():
        assert relative_max_error(reader(ids).logits, model(ids).logits) <= 1e-5


def test_the_mass_on_depth_is_what_the_output_uses():
    """`depth_kv_attentions` against weights recovered from eager attention, slot by slot."""
    for gate in (None, "head"):
        model = moda_model("qwen3", connection="residual", depth_gate=gate)
        ids = random_ids(2, 7)
        with torch.no_grad():
            fused = model(ids, output_depth_attentions=True).depth_kv_attentions
            model.set_attn_implementation("eager")
            eager = model(ids, output_depth_attentions=True, output_attentions=True)
        assert fused[0] is None
        for layer in (1, 2):
            assert fused[layer].shape == (2, 4, 7, 2 * layer)
            assert not fused[layer].requires_grad
            assert torch.allclose(fused[layer], eager.depth_kv_attentions[layer], atol=1e-6)
            total = fused[layer].sum(-1) + eager.attentions[layer].sum(-1)
            assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


def test_a_first_token_reads_depth_only_beside_itself():
    model = moda_model("llama", connection="residual")
    with torch.no_grad():
        out = model(random_ids(1, 5), output_depth_attentions=True)
    mass = out.depth_kv_attentions[2].sum(-1)
    assert (mass > 0).all() and (mass < 1).all()
    assert mass[..., 0].mean() > mass[..., -1].mean(), "the more keys in the sequence, the less mass on depth"


def test_unknown_attention_implementations_are_refused_by_name(monkeypatch):
    model = moda_model("llama", torch.float32, connection="residual")
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "flash_attention_4")
    with pytest.raises(
        ValueError, match=r"attn_implementation: 'flash_attention_4' does not return the log-sum-exp.*sdpa, eager"
    ):
        model(random_ids(1, 4))


def test_dropout_of_the_host_applies_to_the_joint_weights():
    model = moda_model("llama", torch.float32, host={"attention_dropout": 0.5}, connection="residual").train()
    ids = random_ids(1, 6)
    with torch.no_grad():
        first, second = model(ids).logits, model(ids).logits
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert not torch.equal(first, second)
