"""Continuous batching: generations on paged caches are those of `generate`, for AttnRes, MoDA and both."""

import logging

import pytest
import torch
from model_checks import depth_model, randomise_depth
from tiny_hosts import random_ids, tiny_stock_model
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from hf_depthattn.sequence_attention import _aligned_bias

COMBINATIONS = {
    "AttnRes": {"num_blocks": 2},
    "MoDA": {"connection": "residual", "depth_kv": "attention+mlp", "depth_gate": "head"},
    "both": {"num_blocks": 2, "depth_kv": "attention+mlp"},
    "both, unrotated": {"num_blocks": 2, "depth_kv": "attention", "depth_key_rope": "none"},
}
GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
PAGE_SIZE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
# The longer prompts are read in several parts, and rows pack parts of several requests.
SMALL_BATCHES = {"num_blocks": 64, "max_batch_tokens": 12, PAGE_SIZE: 4}


def model_on(host: str, implementation: str, **fields):
    torch.manual_seed(0)
    model = depth_model(tiny_stock_model(host), **fields)
    randomise_depth(model)
    model.set_attn_implementation(implementation)
    return model


def generated_one_by_one(model, prompts: list[list[int]]) -> list[list[int]]:
    generated = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=GREEDY)
        generated.append(output[0, len(prompt) :].tolist())
    return generated


def random_prompts() -> list[list[int]]:
    return [random_ids(1, length)[0].tolist() for length in (5, 11, 1, 29)]


def generated_in_batches(model, prompts: list[list[int]], **options) -> list[list[int]]:
    config = ContinuousBatchingConfig(**SMALL_BATCHES, **options)
    outputs = model.generate_batch(prompts, generation_config=GREEDY, continuous_batching_config=config)
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize(
    ("host", "implementation", "combination"),
    [
        *(("llama", "sdpa", combination) for combination in COMBINATIONS),
        ("llama", "eager", "MoDA"),
        ("mistral", "sdpa", "both"),
        ("gemma3_text", "sdpa", "MoDA"),
        ("gpt_oss", "eager", "both"),
    ],
)
def test_batches_generate_what_generate_does(host, implementation, combination):
    """Mistral and Gemma 3 have sliding windows, which the prompts outgrow; gpt-oss has attention sinks."""
    model = model_on(host, implementation, **COMBINATIONS[combination])
    prompts = random_prompts()
    assert generated_in_batches(model, prompts) == generated_one_by_one(model, prompts)
    assert model.config._attn_implementation == implementation


def test_a_shared_prefix_is_read_once():
    """Its tokens' slots are not computed in the second request, and not needed."""
    model = model_on("llama", "sdpa", **COMBINATIONS["both"])
    prefix = random_ids(1, 16)[0].tolist()
    prompts = [prefix + random_ids(1, 3)[0].tolist() for _ in range(3)]
    assert generated_in_batches(model, prompts, max_requests_per_batch=1) == generated_one_by_one(model, prompts)


def test_the_manager_of_a_server_streams_every_request():
    """What `transformers serve --continuous-batching` does."""
    model = model_on("llama", "sdpa", **COMBINATIONS["both"])
    prompts = random_prompts()
    expected = generated_one_by_one(model, prompts)
    manager = model.init_continuous_batching(
        generation_config=GREEDY, continuous_batching_config=ContinuousBatchingConfig(**SMALL_BATCHES)
    )
    manager.start()
    try:
        names = [manager.add_request(prompt, max_new_tokens=6, streaming=True) for prompt in prompts]
        for name, tokens in zip(names, expected, strict=True):
            *_, last = manager.request_id_iter(name)
            assert last.is_finished() and last.generated_tokens == tokens
    finally:
        manager.stop(block=True, timeout=10)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_an_implementation_without_pages_is_refused_before_generation_starts(implementation):
    model = model_on("llama", "sdpa", **COMBINATIONS["MoDA"])
    # Set as it would be with the package at hand.
    model.config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=rf"attn_implementation: '{implementation}'.*choose one of sdpa, eager"):
        model.generate_batch(random_prompts(), generation_config=GREEDY)


@pytest.mark.parametrize("given", ["config", "no config"])
def test_moda_stays_on_sdpa_where_flash_attention_is_installed(given, monkeypatch):
    from transformers.generation.continuous_batching import continuous_api

    for version in (2, 3):
        monkeypatch.setattr(continuous_api, f"is_flash_attn_{version}_available", lambda **_: True)
    model = model_on("llama", "sdpa", **COMBINATIONS["MoDA"])
    config = ContinuousBatchingConfig(**SMALL_BATCHES) if given == "config" else None
    manager = model.init_continuous_batching(GREEDY, config)
    assert model.config._attn_implementation.removeprefix("paged|") == "sdpa"
    assert manager.model is model and model._supports_flash_attn is True


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_switching_the_implementation_is_silent(implementation, caplog):
    model = model_on("llama", "eager" if implementation == "sdpa" else "sdpa", **COMBINATIONS["both"])
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        model.set_attn_implementation(implementation)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == implementation


@pytest.mark.parametrize("num_keys", [16, 21])
def test_masks_cut_out_of_a_larger_one_suit_the_kernel_for_gpus(num_keys):
    """It wants rows that start at multiples of 16 elements; masks of paged caches are slices of one large tensor."""
    mask = torch.randn(1, 1, 12, 37)[..., :5, :num_keys]
    query, key = torch.empty(1, 4, 5, 8), torch.empty(1, 2, num_keys, 8)
    bias = _aligned_bias(mask, query, key)
    assert bias.stride(-2) % 16 == 0 and bias.stride(-1) == 1
    assert torch.equal(bias, mask.expand(1, 4, 5, num_keys))
