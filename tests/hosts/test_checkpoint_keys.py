"""Checkpoints over all hosts: keys of the host stay its own, and a round trip is exact."""

import pytest
import torch
from moda_models import COMBINATIONS
from model_checks import depth_model, is_depth_key, randomise_depth, relative_max_error
from safetensors.torch import load_file
from tiny_hosts import ALL_HOSTS, random_ids, tiny_host_config, tiny_stock_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from variants import in_turn

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.checkpoint_keys import names_in_memory, stacked_name
from hf_depthattn.conversion.depth_shards import plan_depth_shards
from hf_depthattn.host_attention import REFUSED_DEPTH_KV

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
CAUSAL_LMS = [name for name in ALL_HOSTS if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
HOSTS = [name for name in CAUSAL_LMS if name not in REFUSED_DEPTH_KV]

MODA = {"depth_kv": "attention+mlp", "depth_gate": "head"}
ATTN_RES = {"connection": "attn_res", "sublayers_per_block": 2}
VARIANTS = {"AttnRes": ATTN_RES, **{name: {**MODA, **fields} for name, fields in COMBINATIONS.items()}}


@pytest.mark.parametrize(
    ("model_type", "variant"),
    in_turn(HOSTS, list(VARIANTS)) + [(name, "AttnRes") for name in CAUSAL_LMS if name not in HOSTS],
)
def test_checkpoint_keys_are_the_hosts_own_and_the_round_trip_is_exact(model_type, variant, tmp_path):
    """Renamings of hosts (Mixtral's `block_sparse_moe`) must leave `mlp_depth_kv` alone."""
    stock = tiny_stock_model(model_type)
    model = depth_model(stock, **VARIANTS[variant])
    randomise_depth(model)
    added = {name for name in model.state_dict() if is_depth_key(name)}
    stock.save_pretrained(tmp_path / "stock")
    loaded = model
    for folder in ("first", "second"):
        loaded.save_pretrained(tmp_path / folder)
        tensors = load_file(tmp_path / folder / "model.safetensors")
        depth_keys = set(filter(is_depth_key, tensors))
        assert depth_keys == set(added)
        if variant == "AttnRes":
            assert depth_keys == {"model.depth_reads.query", "model.depth_reads.key_norm"}
        assert tensors.keys() - depth_keys == load_file(tmp_path / "stock" / "model.safetensors").keys()
        loaded, info = DepthAttnForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert relative_max_error(loaded.eval()(ids).logits, model(ids).logits) <= 1e-5
    _, info = type(stock).from_pretrained(tmp_path / "second", config=stock.config, output_loading_info=True)
    assert not info["missing_keys"], "the stock class finds every weight of its own"
    # The way that Trainer resumes.
    nested = names_in_memory(model, tensors)
    assert added <= nested.keys()
    assert_same_tensors(nested, model.state_dict())


def assert_same_tensors(actual, expected) -> None:
    # Files hold tied weights once.
    assert actual.keys() <= expected.keys()
    assert [name for name, tensor in actual.items() if not torch.equal(tensor, expected[name])] == []


@pytest.mark.parametrize("model_type", HOSTS)
def test_tensors_that_retrofitting_writes_are_those_of_the_model(model_type):
    config = DepthAttnConfig.moda(tiny_host_config(model_type), connection="attn_res", depth_gate="head")
    with torch.device("meta"):
        model = DepthAttnForCausalLM(config).bfloat16()
    expected = {
        name: (DTYPE_NAMES[value.dtype], tuple(value.shape), value.nbytes)
        for name, value in model.state_dict().items()
        if is_depth_key(name)
    }
    shards = plan_depth_shards(config, "model.", torch.bfloat16)
    assert {
        name: tensor for shard in shards for module in shard for name, tensor in module.tensors.items()
    } == expected


@pytest.mark.parametrize("model_type", HOSTS)
def test_fresh_projections_are_drawn_like_the_hosts_own_matrices(model_type):
    """`conversion/depth_shards.py` relies on `initializer_range`; a host that draws otherwise would be seen here."""
    config = tiny_host_config(model_type, hidden_size=64)
    model = DepthAttnForCausalLM(DepthAttnConfig.moda(config))
    weights = [p for name, p in model.named_parameters() if ".mlp_depth_kv." in name]
    drawn = torch.cat([weight.flatten() for weight in weights])
    assert abs(drawn.std().item() / config.initializer_range - 1) < 5 * (2 * drawn.numel()) ** -0.5
    assert abs(drawn.mean().item() / config.initializer_range) < 5 * drawn.numel() ** -0.5


def test_only_whole_names_of_old_tensors_are_renamed():
    """Patterns of transformers before 5.18 also match the start of a name."""
    assert stacked_name("model.layers.1.attn_depth.query") == "model.depth_reads.query"
    assert stacked_name("model.layers.1.attn_depth.key_norm.weight") == "model.depth_reads.key_norm"
    assert stacked_name("model.layers.1.attn_depth.query_proj.weight") is None
