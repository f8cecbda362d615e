"""Every supported host: zero queries reproduce it, decoding with a cache equals decoding without, gradients arrive."""

import pytest
import torch
from model_checks import depth_model, is_depth_key, randomise_depth, relative_max_error
from tiny_hosts import ALL_HOSTS, NUM_LAYERS, random_ids, tiny_host_config, tiny_stock_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from variants import in_turn

from hf_depthattn import DepthAttnConfig, supported_hosts
from hf_depthattn.host_layouts import REFUSED_HOSTS

HOSTS = [name for name in ALL_HOSTS if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def test_every_causal_language_model_is_a_host_or_refused_with_its_own_reason():
    """New versions of transformers bring new ones: they get a row in one of the two tables."""
    assert not set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(supported_hosts()) - set(REFUSED_HOSTS)
    assert not set(REFUSED_HOSTS) & set(supported_hosts())


def test_a_host_whose_config_makes_attention_and_mlp_parallel_is_refused():
    config = tiny_host_config("stablelm", use_parallel_residual=True)
    with pytest.raises(Exception, match="'stablelm' cannot be a host with use_parallel_residual=True"):
        DepthAttnConfig.attn_res(config)


@pytest.mark.parametrize(("model_type", "sublayers_per_block"), in_turn(HOSTS, [1, 2, 5]))
def test_zero_query_sum_equals_host(model_type, sublayers_per_block):
    ids = random_ids(2, 11)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        stock = tiny_stock_model(model_type, dtype)
        model = depth_model(stock, sublayers_per_block=sublayers_per_block, read_scale="sum")
        with torch.no_grad():
            assert relative_max_error(model(ids).logits, stock(ids).logits) <= tolerance


@pytest.mark.parametrize("model_type", HOSTS)
def test_residual_connection_equals_host_exactly(model_type):
    stock = tiny_stock_model(model_type)
    model = depth_model(stock, connection="residual")
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("model_type", HOSTS)
def test_cached_greedy_generation_equals_uncached(model_type):
    model = depth_model(tiny_stock_model(model_type), num_blocks=3, read_scale="sum")
    randomise_depth(model)
    model.generation_config.eos_token_id = None
    ids = random_ids(2, 9)
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(ids, use_cache=True, **arguments)
    uncached = model.generate(ids, use_cache=False, **arguments)
    assert cached.shape == (2, 17)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("model_type", HOSTS)
def test_gradients_reach_every_depth_parameter_with_several_sources(model_type):
    model = depth_model(tiny_stock_model(model_type), sublayers_per_block=2).train()
    randomise_depth(model)
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    depth_gradients = [p.grad for name, p in model.named_parameters() if is_depth_key(name)]
    assert len(depth_gradients) == 2
    for gradient in depth_gradients:
        # Site 0 reads the embedding alone: its gradient is exactly zero.
        assert gradient.any(dim=-1).tolist() == [False] + [True] * 2 * NUM_LAYERS


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "mixtral", "qwen3_moe"])
def test_heads_keep_the_behaviour_of_the_host(model_type):
    """Soft-capping, logit scaling, and the auxiliary loss of MoE hosts, which enters `loss`."""
    moe = {"output_router_logits": True} if model_type in ("mixtral", "qwen3_moe") else {}
    stock = tiny_stock_model(model_type, **moe)
    model = depth_model(stock, num_blocks=2, read_scale="sum")
    ids = random_ids(2, 11)
    with torch.no_grad():
        expected, actual = stock(ids, labels=ids), model(ids, labels=ids)
    assert type(actual) is type(expected)
    assert torch.allclose(actual.loss, expected.loss, rtol=1e-5)
    if moe:
        assert torch.allclose(actual.aux_loss, expected.aux_loss, rtol=1e-5)
        assert len(actual.router_logits) == NUM_LAYERS


def test_tied_embeddings_stay_tied():
    stock = tiny_stock_model("llama", tie_word_embeddings=True)
    model = depth_model(stock, num_blocks=2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3", "kimi_linear", "gpt_oss"])
def test_generation_from_embeddings_equals_generation_from_ids(model_type):
    model = depth_model(tiny_stock_model(model_type), num_blocks=3)
    randomise_depth(model)
    model.generation_config.eos_token_id = None
    ids = random_ids(2, 9)
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **arguments), model.generate(ids, **arguments)[:, 9:])
