"""What vLLM and SGLang require of a model that their transformers backend runs, stated again.

Neither engine is installed here; the conditions were read in the sources of vLLM 0.33.0 and SGLang 0.5.23, and every
test names its place. Paths of vLLM are relative to `vllm/model_executor/models/`, those of SGLang to `sglang/srt/`.
"""

import ast
import inspect
import re
import textwrap
from itertools import pairwise

import pytest
import torch
from connection_cases import FIELDS
from model_checks import randomise_depth, relative_max_error
from safetensors.torch import load_file
from tiny_checkpoints import load, weights_of
from tiny_hosts import random_ids, tiny_host_config, tiny_stock_model
from torch import nn
from transformers import AutoModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM, DepthAttnModel, retrofit

ATTN_RES = {"connection": "attn_res", "sublayers_per_block": 2, "query": "input"}
#: Options with which attention computes something else than in the host.
OWN_ATTENTION = {
    "MoDA": {"depth_kv": "attention+mlp", "depth_gate": "head"},
    "MoDA alone": {"connection": "residual", "depth_kv": "attention"},
    "value residual": {"value_residual": True},
}
DENSE_HOSTS = ["llama", "qwen3", "gemma2", "olmo2"]


def config_of(host: str = "llama", **fields) -> DepthAttnConfig:
    return DepthAttnConfig(text_config=tiny_host_config(host), **(fields or ATTN_RES))


def random_model(host: str = "llama", **fields) -> DepthAttnForCausalLM:
    torch.manual_seed(0)
    model = DepthAttnForCausalLM(config_of(host, **fields)).eval()
    randomise_depth(model)
    return model


# --- which class, and whether it may be run ---


def class_for_engines(folder):
    """The class that both engines look at: registry.py `_try_resolve_transformers`, model_loader/utils.py."""
    auto_map = DepthAttnConfig.from_pretrained(folder).auto_map
    first = next(name for name in auto_map if name.startswith("AutoModel"))
    assert first == "AutoModel"
    return get_class_from_dynamic_module(auto_map[first], folder)


def vllm_accepts(model_class) -> bool:
    """registry.py `_try_resolve_transformers`."""
    return model_class.is_backend_compatible() or model_class._can_set_attn_implementation()


@pytest.mark.parametrize("fields", OWN_ATTENTION.values(), ids=OWN_ATTENTION)
def test_the_class_alone_refuses_a_model_with_attention_of_its_own(fields, tmp_path):
    config_of(**fields).save_pretrained(tmp_path)
    model_class = class_for_engines(tmp_path)
    assert not vllm_accepts(model_class)
    # SGLang: model_loader/utils.py `resolve_transformers_arch`, models/transformers.py `TransformersBase.__init__`.
    assert not model_class.is_backend_compatible()
    # It is a name only: what it builds is the model.
    model = AutoModel.from_config(DepthAttnConfig.from_pretrained(tmp_path))
    built = model_class(config_of(**fields))
    assert type(built).__name__ == type(model).__name__
    assert not model._supports_attention_backend


def test_vllm_accepts_the_class_of_attn_res(tmp_path):
    config_of().save_pretrained(tmp_path)
    assert vllm_accepts(class_for_engines(tmp_path))


def test_sglang_refuses_attn_res_by_its_class(tmp_path):
    """utils/hf_transformers/common.py `get_hf_text_config` takes every config with a `text_config` for multimodal, so
    a model that it accepted would be built as one."""
    config_of().save_pretrained(tmp_path)
    assert not class_for_engines(tmp_path).is_backend_compatible()


def test_the_config_is_its_own_text_config():
    """vllm/config/model.py `_get_transformers_backend_cls`: otherwise the model is multimodal."""
    config = config_of("qwen3")
    assert config.get_text_config() is config and config.get_text_config(decoder=True) is config
    # model_arch_config_convertor.py reads the shapes from it.
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"):
        assert getattr(config, name) == getattr(config.text_config, name)


# --- weights ---


def names_in_vllm(model: nn.Module, names: list[str]) -> list[str]:
    """transformers/base.py `_create_hf_to_vllm_mapper`: renamings first, then the prefix of the base model."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    children = "|".join(name for name, _ in [*model.named_children(), *model.named_parameters(recurse=False)])
    rules = [
        *([(rf"^{model.base_model_prefix}\.(.+)", r"model.\1")] if model.base_model_prefix != "model" else ()),
        (rf"^(?!model\.)(({children}).*)", r"model.\1"),
        (rf"^(model\.)((?!{children}).+)", r"\2"),
        (r"^model\.(.+\.)*(lm_head.+)", r"\2"),
    ]
    found = []
    for name in names:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found.append(name)
    return found


@pytest.mark.parametrize("host", DENSE_HOSTS)
def test_every_key_of_a_checkpoint_has_its_parameter_in_vllm(host, tmp_path):
    model = random_model(host)
    model.save_pretrained(tmp_path)
    keys = [key for shard in weights_of(tmp_path) for key in load_file(shard)]
    parameters = {f"model.{name}" for name, _ in model.model.named_parameters()}
    assert any("depth_reads" in key for key in keys) and any("query_proj" in key for key in keys)
    # The head is vLLM's own.
    assert set(names_in_vllm(model.model, keys)) - {"lm_head.weight"} == parameters


@pytest.mark.parametrize("connection", FIELDS)
def test_float32_parameters_are_found_by_name_and_not_by_pattern(connection):
    """transformers/base.py `keep_in_fp32`: names of `_keep_in_fp32_modules_strict` are escaped."""
    with torch.device("meta"):
        model = AutoModel.from_config(config_of(**FIELDS[connection]), dtype=torch.bfloat16)
    escaped = re.compile("|".join(map(re.escape, model._keep_in_fp32_modules_strict)))
    expected = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    # `init_parameters` has made all of them half precision before.
    assert {name for name, _ in model.named_parameters() if escaped.search(name)} == expected
    assert bool(expected) == any(name.startswith("depth_reads") or "_depth." in name for name in expected)


def test_every_style_of_the_tensor_parallel_plan_is_known():
    """transformers/utils.py `replace_linear_class` replicates layers whose style it does not know."""
    sharded = {"colwise", "rowwise", "colwise_gather_output", "rowwise_split_input", "replicate"}
    model = DepthAttnModel(config_of("llama"))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plan = {name: style for name, style in model.tp_plan.items() if any(re.match(name, module) for module in linear)}
    assert set(plan.values()) <= sharded
    # Every device has the whole depth state.
    assert {name.rpartition(".")[2] for name in linear} - {name.rpartition(".")[2] for name in plan} == {"query_proj"}


def test_a_layer_of_another_pipeline_stage_is_an_error():
    """transformers/base.py `pipeline_parallel` passes `hidden_states` alone to the next stage."""
    model = DepthAttnModel(config_of())
    # `layers` is the only list, so that the stages can be found.
    assert [name for name, module in model.named_children() if isinstance(module, nn.ModuleList)] == ["layers"]
    del model.layers[0]
    with pytest.raises(RuntimeError, match="got a Tensor instead of the previous layer's DepthState"):
        model(random_ids(1, 3), use_cache=False)


# --- attention ---


def interface_calls(module: nn.Module) -> list[ast.Call]:
    """transformers/fusers/attention.py `interface_call`: calls of what is read from `ALL_ATTENTION_FUNCTIONS`."""
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return []
    tree = ast.parse(textwrap.dedent(source))
    names = {
        ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [call for call in calls if call.func.id in names]


@pytest.mark.parametrize("host", DENSE_HOSTS)
def test_every_layer_has_one_attention_that_an_engine_can_take_over(host):
    model = DepthAttnModel(config_of(host))
    found = {}
    for module in model.modules():
        # `_get_attn_cls`: one module that is not causal makes the model an encoder.
        assert getattr(module, "is_causal", True)
        if len(calls := interface_calls(module)) == 1:
            (scaling,) = (keyword.value for keyword in calls[0].keywords if keyword.arg == "scaling")
            assert isinstance(getattr(module, scaling.attr), float)
            assert module.layer_idx not in found
            found[module.layer_idx] = module
    assert sorted(found) == list(range(len(model.layers)))


@pytest.fixture
def engine():
    """Attention of packed sequences, as an engine computes it; records what it is called with."""
    calls = []

    def attention(module, query, key, value, attention_mask, scaling, starts=None, **kwargs):
        calls.append((module.layer_idx, attention_mask))
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        outputs = []
        for start, end in pairwise(starts):
            scores = query[:, :, start:end] @ key[:, :, start:end].transpose(-1, -2) * scaling
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            outputs.append(scores.softmax(-1) @ value[:, :, start:end])
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["engine"] = attention
    yield calls
    del ALL_ATTENTION_FUNCTIONS._local_mapping["engine"]


@pytest.mark.parametrize("host", ["llama", "qwen3", "olmo2"])
def test_packed_sequences_through_another_attention_give_the_same_logits(host, engine, tmp_path):
    """transformers/base.py `_patch_config`, `_create_model` and `forward`."""
    model = random_model(host)
    model.save_pretrained(tmp_path)
    config = DepthAttnConfig.from_pretrained(tmp_path)
    config.get_text_config()._attn_implementation = "engine"
    base = AutoModel.from_config(config, dtype=torch.float32).eval()
    base.load_state_dict(model.model.state_dict())
    sequences = [random_ids(1, 7), random_ids(1, 4)]
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in sequences])
    with torch.no_grad():
        states = base(
            input_ids=torch.cat(sequences, dim=1),
            inputs_embeds=None,
            use_cache=False,
            position_ids=positions[None],
            return_dict=False,
            # SGLang passes what its attention needs like this; models/transformers.py `_run_hf_backbone`.
            starts=(0, 7, 11),
        )[0]
        expected = torch.cat([model.model(ids, use_cache=False)[0] for ids in sequences], dim=1)
    assert [layer for layer, _ in engine] == list(range(config.num_hidden_layers))
    assert all(mask is None for _, mask in engine)
    assert relative_max_error(states, expected) < 1e-5


def test_a_retrofit_is_what_the_engine_reads(tmp_path):
    """The files of `depthattn retrofit`, not only of `save_pretrained`."""
    tiny_stock_model("llama").save_pretrained(tmp_path / "stock")
    retrofit(tmp_path / "stock", tmp_path / "depth", num_blocks=2)
    assert vllm_accepts(class_for_engines(tmp_path / "depth"))
    model = load(tmp_path / "depth")
    keys = [key for shard in weights_of(tmp_path / "depth") for key in load_file(shard)]
    expected = {f"model.{name}" for name, _ in model.model.named_parameters()}
    assert set(names_in_vllm(model.model, keys)) - {"lm_head.weight"} == expected
