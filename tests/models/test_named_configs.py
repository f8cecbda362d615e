"""The named configurations in examples/configs: their sizes, their files, and that such models train."""

import json

import pytest
import torch
from repository import ROOT
from tiny_hosts import VOCAB_SIZE, needs_kimi_linear, random_ids
from transformers import AutoConfig, AutoModelForCausalLM

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.depth_options import DEPTH_OPTIONS

FOLDER = ROOT / "examples" / "configs"
NAMES = sorted(
    path.parent.name
    for path in FOLDER.glob("*/config.json")
    if json.loads(path.read_text())["model_type"] == "depthattn"
)
MODA = ("moda_700m", "moda_small_64l")
TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def load(name: str) -> DepthAttnConfig:
    return AutoConfig.from_pretrained(FOLDER / name)


def own_fields(config: DepthAttnConfig) -> dict:
    """What the config says beside the host."""
    return {name: getattr(config, name) for name in DEPTH_OPTIONS}


def on_meta(config: DepthAttnConfig) -> DepthAttnForCausalLM:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def sizes(model: torch.nn.Module) -> tuple[int, int]:
    """Numbers of parameters in matrices and in vectors."""
    parameters = list(model.parameters())
    matrices = sum(parameter.numel() for parameter in parameters if parameter.dim() > 1)
    return matrices, sum(parameter.numel() for parameter in parameters) - matrices


def layers_with_mlp_projections(model: DepthAttnForCausalLM) -> list[int]:
    return [layer.layer_idx for layer in model.model.layers if layer.mlp_depth_kv is not None]


def tiny(name: str) -> DepthAttnConfig:
    """The same fields on a host of the same kind with three layers."""
    config = load(name)
    host = {key: value for key, value in config.text_config.to_dict().items() if key != "layer_types"}
    sized = {key: value for key, value in {**TINY, "head_dim": 8}.items() if key in host}
    if "mlp_layer_types" in host:
        sized["mlp_layer_types"] = host["mlp_layer_types"][: TINY["num_hidden_layers"]]
    return DepthAttnConfig(text_config={**host, **sized}, **own_fields(config))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_kimi_linear) if "kimi_linear" in name else name for name in NAMES]
)
def test_file_is_what_the_code_writes(name, tmp_path):
    config = load(name)
    assert type(config) is DepthAttnConfig
    config.save_pretrained(tmp_path)
    committed, saved = (json.loads((path / "config.json").read_text()) for path in (FOLDER / name, tmp_path))
    assert saved.pop("auto_map"), "the code goes along; these folders hold none"
    # Fields that transformers adds to every config come and go with its versions.
    assert committed.pop("text_config").items() <= saved.pop("text_config").items()
    assert {**committed, "transformers_version": saved["transformers_version"]} == saved
    assert own_fields(config).keys() <= committed.keys()


def test_moda_700m_has_the_parameters_of_the_paper():
    """arXiv 2603.15619, table 3: 705.7M, and 669.0M without MoDA; norm vectors are not in these figures."""
    config = load("moda_700m")
    model = on_meta(config)
    assert layers_with_mlp_projections(model) == list(range(35))
    norm_vectors = 36 * (1024 + 512 + 2 * 1024) + 1024
    assert sizes(model) == (705_691_648, norm_vectors)
    assert sum(parameter.numel() for parameter in model.parameters()) == 705_821_696
    assert sizes(on_meta(DepthAttnConfig.residual(config.text_config))) == (668_991_488, norm_vectors)
    assert config.depth_slot_plan.num_read == tuple(2 * layer for layer in range(36))
    assert config.max_position_embeddings == 4096


def test_moda_small_64l_is_post_norm_with_63_projection_pairs():
    config = load("moda_small_64l")
    model = on_meta(config)
    assert layers_with_mlp_projections(model) == list(range(63))
    layout = config.host_layout
    for sublayer, norm in ((layout.attention, "input_layernorm"), (layout.mlp, "post_attention_layernorm")):
        assert (sublayer.pre_norm, sublayer.post_norm, sublayer.stream_norm) == (None, None, norm)
    assert sum(sizes(model)) == 176_955_648
    biases = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith(".bias"))
    assert biases == 64 * (2 * 512 + 2 * 128 + 2 * 1024 + 512) + 63 * 2 * 128
    assert (config.depth_key_rope, config.depth_key_norm, config.depth_kv_bias) == ("none", "reader", True)


@pytest.mark.parametrize("name", MODA)
def test_tiny_version_trains(name):
    torch.manual_seed(0)
    config = tiny(name)
    assert own_fields(config) == own_fields(load(name))
    model = DepthAttnForCausalLM(config).train()
    assert layers_with_mlp_projections(model) == [0, 1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = random_ids(2, 21)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
