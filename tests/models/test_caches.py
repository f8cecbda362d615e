"""Generating with caches, padding and drafts gives what the model gives without."""

import gc
import weakref

import pytest
import torch
from depth_forms import FORMS, every_form, random_model
from gpu_suite_tools import module
from model_checks import depth_model
from tiny_hosts import random_ids, tiny_stock_model
from transformers import DynamicCache, StaticCache

peak_state = module("state_bytes").peak_state
FIELDS = {"connection": "attn_res", "num_blocks": 3, "depth_kv": "attention+mlp"}


def moda_model(model_type="llama", **fields):
    return random_model(model_type, **{**FIELDS, **fields})


def check_cached_logits(model, ids, cache_implementation, *, num_tokens, atol):
    """Generating token by token with a cache gives the logits of one pass without."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        cache_implementation=cache_implementation,
        disable_compile=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        full = model(output.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), full, rtol=1e-4, atol=atol)


# --- every form ---


@every_form
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_cached_logits_equal_uncached_token_by_token(fields, cache_implementation):
    model = random_model(**fields)
    ids = random_ids(2, 7)
    check_cached_logits(model, ids, cache_implementation, num_tokens=6, atol=1e-5)


@every_form
def test_chunked_prefill_gives_the_same_tokens_with_a_smaller_state(fields):
    """The depth state only has the tokens of a chunk."""
    model, ids, chunk_size = random_model(**fields), random_ids(2, 24), 5
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    options = {"attention_mask": padding, "max_new_tokens": 4, "do_sample": False}
    with peak_state(model) as whole:
        expected = model.generate(ids, **options)
    with peak_state(model) as chunked:
        tokens = model.generate(ids, **options, prefill_chunk_size=chunk_size)
    assert torch.equal(tokens, expected)
    assert chunked.num_bytes * ids.shape[1] == whole.num_bytes * chunk_size


@every_form
def test_left_padding_changes_nothing(fields):
    model = random_model(**fields)
    ids = random_ids(1, 7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(11) >= 4).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(generated[:, 4:], alone)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [*(("llama", fields) for fields in FORMS.values()), ("qwen3", FIELDS)],
    ids=[*FORMS, "qwen3-moda-block3"],
)
def test_beam_search_equals_the_uncached_one(model_type, fields):
    model, ids = random_model(model_type, **fields), random_ids(2, 6)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments))


@every_form
def test_chunked_prefill_equals_one_forward(fields):
    model, ids = random_model(**fields), random_ids(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        cache, parts = None, []
        for chunk in ids.split(5, dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


@every_form
def test_prompt_lookup_decoding_equals_greedy(fields):
    model, ids = random_model(**fields), random_ids(1, 12)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **arguments), model.generate(ids, **arguments))


# --- MoDA: every kind of cache, and no depth keys left behind between calls ---


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "olmo3", "gpt_oss", "deepseek_v3", "kimi_linear"])
def test_logits_with_a_cache_equal_those_without_token_by_token(model_type, cache, implementation):
    """Past the sliding window (8) too: 7 tokens of prompt, 10 generated."""
    if model_type == "kimi_linear" and cache == "static":
        pytest.skip("linear attention has no static cache on the host either")
    if model_type == "gpt_oss" and implementation == "sdpa":
        pytest.skip("the host has no sdpa: attention sinks")
    model = moda_model(model_type)
    model.set_attn_implementation(implementation)
    ids = random_ids(2, 7)
    check_cached_logits(model, ids, cache, num_tokens=10, atol=2e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("chunk", [1, 3, 5])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_prefill_in_chunks_of_any_size_equals_one_forward(model_type, chunk, cache_class):
    model, ids = moda_model(model_type), random_ids(2, 13)
    arguments = {"max_cache_len": 16} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config.text_config, **arguments)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(chunk, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_left_padded_batches_generate_as_each_prompt_alone(model_type):
    model = moda_model(model_type)
    short, long = random_ids(1, 4), random_ids(1, 11)
    padded = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(padded)
    mask[0, :7] = 0
    arguments = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(padded, attention_mask=mask, **arguments)
    for row, prompt in zip(together, (short, long), strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
        assert torch.equal(row[-6:], alone[0, -6:])


@pytest.mark.parametrize("assistant_has_moda", [False, True])
def test_assisted_decoding_equals_greedy(assistant_has_moda):
    model, ids = moda_model("llama"), random_ids(1, 9)
    assistant = moda_model("llama") if assistant_has_moda else tiny_stock_model("llama")
    assistant.generation_config.eos_token_id = None
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, assistant_model=assistant, **arguments), model.generate(ids, **arguments))


def test_a_quantised_cache_gives_the_hosts_error_and_no_more():
    pytest.importorskip("optimum.quanto")
    model, ids = moda_model("llama", host_fields={"head_dim": 64}), random_ids(1, 9)
    config = {"backend": "quanto", "nbits": 4, "residual_length": 4}
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    out = model.generate(ids, cache_implementation="quantized", cache_config=config, **arguments)
    assert out.shape == (1, 17)


class RoundingLayer(DynamicCache):
    """Stands for a quantised cache: what comes back of earlier tokens is rounded, the new ones are exact."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        num_new = key_states.shape[-2]
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        rounded = [torch.cat([x[..., :-num_new, :].half().to(x), x[..., -num_new:, :]], -2) for x in (keys, values)]
        return rounded[0], rounded[1]


def test_slots_are_made_from_new_tokens_whatever_the_cache_does_to_old_ones():
    model, ids = moda_model("llama"), random_ids(1, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = RoundingLayer(config=model.config.text_config)
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-2, atol=1e-3)


def cached_bytes(cache) -> int:
    return sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor))


def test_no_depth_keys_are_kept_between_calls():
    """The cache of a MoDA model has the bytes of the host's, and nothing else outlives a call."""
    stock = tiny_stock_model("llama")
    model = depth_model(stock, **FIELDS)
    ids = random_ids(2, 9)
    live = []

    def remember(module, args, output):
        live.extend(tensor for tensor in (*output.depth_keys, *output.depth_values))

    handle = model.model.layers[1].register_forward_hook(remember)
    caches = [m(ids, use_cache=True).past_key_values for m in (stock, model)]
    handle.remove()
    assert cached_bytes(caches[0]) == cached_bytes(caches[1]) > 0
    references = [weakref.ref(tensor) for tensor in live]
    assert references
    del live[:], caches
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_generation_under_compile_with_a_static_cache():
    torch._dynamo.reset()
    model, ids = moda_model("llama"), random_ids(1, 6)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **arguments)
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    cache = StaticCache(config=model.config.text_config, max_cache_len=10)
    tokens = ids
    with torch.no_grad():
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        for position in range(6, 10):
            token = logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, token], 1)
            position_ids = torch.tensor([[position]])
            logits = compiled(token, past_key_values=cache, use_cache=True, position_ids=position_ids).logits
    assert torch.equal(tokens, expected)
