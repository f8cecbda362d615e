"""Our classes have the structure of the host's: children, names of parameters, classes, prefix; old folders load."""

import contextlib
import copy
import inspect
import json
import pickle

import pytest
import safetensors.torch
import torch
import transformers
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from model_checks import LOADS_MODULES_TO_SAVE, depth_model, is_depth_key, randomise_depth
from repository import DATA
from safetensors.torch import load_file
from tiny_hosts import ALL_HOSTS, random_ids, tiny_host_config, tiny_stock_model
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from variants import in_turn

from hf_depthattn import (
    DepthAttnConfig,
    DepthAttnForCausalLM,
    DepthAttnForQuestionAnswering,
    DepthAttnForSequenceClassification,
    DepthAttnModel,
)
from hf_depthattn.checkpoints.old_adapters import convert_adapter
from hf_depthattn.host_attention import REFUSED_DEPTH_KV

HOSTS = [name for name in ALL_HOSTS if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
OLD_FOLDERS = DATA / "saved_with_nested_host"
HEADS = {
    "AutoModelForSequenceClassification": DepthAttnForSequenceClassification,
    "AutoModelForQuestionAnswering": DepthAttnForQuestionAnswering,
}
BOTH = {"num_blocks": 2, "depth_kv": "attention+mlp", "depth_gate": "head"}


def name_of(module, model) -> str:
    return next(name for name, child in model.named_modules() if child is module)


def with_moda_if_possible(config) -> dict:
    return {"num_blocks": 2} if config.model_type in REFUSED_DEPTH_KV else BOTH


@pytest.mark.parametrize("model_type", HOSTS)
def test_children_and_names_are_the_hosts(model_type):
    stock = tiny_stock_model(model_type)
    model = depth_model(stock, **with_moda_if_possible(stock.config))
    assert [name for name, _ in model.named_children()] == [name for name, _ in stock.named_children()]
    names = {name for name, _ in model.named_parameters(remove_duplicate=False) if not is_depth_key(name)}
    assert names == {name for name, _ in stock.named_parameters(remove_duplicate=False)}
    assert isinstance(model, type(stock)) and isinstance(model.model, type(stock.model))
    assert isinstance(model.model, DepthAttnModel)
    assert model.base_model_prefix == stock.base_model_prefix and model.base_model is model.model
    for find in ("get_decoder", "get_input_embeddings", "get_output_embeddings"):
        assert name_of(getattr(model, find)(), model) == name_of(getattr(stock, find)(), stock)
    assert (model._tied_weights_keys or {}) == (stock._tied_weights_keys or {})
    assert model.config.to_dict()["tie_word_embeddings"] == stock.config.tie_word_embeddings


@pytest.mark.parametrize("model_type", HOSTS)
def test_names_in_memory_are_names_in_files(model_type, tmp_path):
    """But for hosts whose own names differ, which are those of the stock class then."""
    stock = tiny_stock_model(model_type)
    model = depth_model(stock, **with_moda_if_possible(stock.config))
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    in_file, in_stock_file = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "stock"))
    in_memory = set(model.state_dict()) - set(model.all_tied_weights_keys)
    renamed_by_host = set(stock.state_dict()) - set(stock.all_tied_weights_keys) != set(in_stock_file)
    if renamed_by_host:
        assert {name for name in in_memory if is_depth_key(name)} == {key for key in in_file if is_depth_key(key)}
        assert {key for key in in_file if not is_depth_key(key)} == set(in_stock_file)
    else:
        assert in_memory == set(in_file)


@pytest.mark.parametrize("auto_name", HEADS)
@pytest.mark.parametrize("model_type", ["llama", "olmo2", "mixtral"])
def test_heads_call_their_children_as_the_hosts_heads_do(model_type, auto_name):
    host_config = tiny_host_config(model_type)
    config = DepthAttnConfig.attn_res(host_config, **BOTH)
    try:
        stock = getattr(transformers, auto_name).from_config(host_config)
    except ValueError:
        pytest.skip(f"{model_type} has no such head")
    model = HEADS[auto_name](config)
    assert [name for name, _ in model.named_children()] == [name for name, _ in stock.named_children()]
    assert model.base_model_prefix == stock.base_model_prefix
    names = {name for name, _ in model.named_parameters() if not is_depth_key(name)}
    assert names == {name for name, _ in stock.named_parameters()}


def test_isinstance_holds_for_the_public_classes_and_the_hosts():
    model = AutoModelForCausalLM.from_config(DepthAttnConfig.attn_res(tiny_host_config("llama")))
    assert isinstance(model, DepthAttnForCausalLM) and isinstance(model, LlamaForCausalLM)
    assert isinstance(model.model, DepthAttnModel) and isinstance(model.model, LlamaModel)
    assert type(model).__name__ == "DepthAttnForCausalLM"
    assert model.config is model.model.config


def test_one_class_for_each_host():
    """A model of another host is built by the class of a model at hand, as trainers make reference models."""
    llama = DepthAttnForCausalLM(DepthAttnConfig.attn_res(tiny_host_config("llama")))
    qwen = type(llama)(DepthAttnConfig.attn_res(tiny_host_config("qwen3")))
    assert isinstance(qwen, transformers.Qwen3ForCausalLM) and not isinstance(qwen, LlamaForCausalLM)
    assert qwen(random_ids(1, 5)).logits.isfinite().all()
    assert type(DepthAttnForCausalLM(llama.config)) is type(llama)


@pytest.mark.parametrize(
    ("model_type", "cls"),
    in_turn(HOSTS, [DepthAttnModel, DepthAttnForCausalLM, DepthAttnForSequenceClassification]),
)
def test_the_config_of_a_model_builds_another(model_type, cls, tmp_path):
    config = DepthAttnConfig.attn_res(tiny_host_config(model_type), num_blocks=2)
    built = cls(config)
    built.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for model in (built, loaded):
        twin = cls(model.config)
        assert twin.load_state_dict(model.state_dict()).missing_keys == []
        assert type(model)(model.config).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_plain_loaders_read_what_is_saved(model_type, tmp_path):
    stock, ids = tiny_stock_model(model_type), random_ids(2, 7)
    model = depth_model(stock, **BOTH)
    randomise_depth(model)
    safetensors.torch.save_model(model, tmp_path / "plain.safetensors")
    twin = DepthAttnForCausalLM(model.config).eval()
    safetensors.torch.load_model(twin, tmp_path / "plain.safetensors")
    assert torch.equal(twin(ids).logits, model(ids).logits)
    if model_type == "llama":  # accelerate knows no renamings of hosts
        model.save_pretrained(tmp_path / "saved")
        with init_empty_weights():
            empty = DepthAttnForCausalLM(model.config)
        dispatched = load_checkpoint_and_dispatch(empty, tmp_path / "saved", device_map={"": "cpu"}).eval()
        assert torch.equal(dispatched(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", json.loads((OLD_FOLDERS / "expected.json").read_text()))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_folders_saved_with_a_nested_host_load(name, tmp_path):
    """Checkpoints and adapters of 0.1.0.dev0 before its classes had the host's structure (transformers 5.23)."""
    expected = torch.tensor(json.loads((OLD_FOLDERS / "expected.json").read_text())[name])
    base = {"adapter_of_causal_lm": "causal_lm", "adapter_of_sequence_classification": "sequence_classification"}
    folder = OLD_FOLDERS / base.get(name, name)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    auto_name = "AutoModel" + architecture.removeprefix("DepthAttn").removeprefix("Model")
    model, info = getattr(transformers, auto_name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    models = [model]
    if name in base:
        peft = pytest.importorskip("peft")
        convert_adapter(OLD_FOLDERS / name, tmp_path / name)
        models = [peft.PeftModel.from_pretrained(model, tmp_path / name)]
        # transformers 5.24 asks for a PEFT that may not be there.
        if LOADS_MODULES_TO_SAVE:
            other = getattr(transformers, auto_name).from_pretrained(folder)
            with contextlib.suppress(ImportError):
                other.load_adapter(str(tmp_path / name))
                models.append(other)
    for each in models:
        with torch.no_grad():
            found = each.eval()(torch.arange(3, 12)[None])[0].flatten()[-40:]
        assert torch.allclose(found, expected, atol=2e-6), (found - expected).abs().max()


def test_a_base_checkpoint_and_a_head_load_each_other(tmp_path):
    model = DepthAttnForCausalLM(DepthAttnConfig.attn_res(tiny_host_config("mixtral"), **BOTH))
    randomise_depth(model)
    ids = random_ids(1, 7)
    model.save_pretrained(tmp_path / "causal")
    base = AutoModel.from_pretrained(tmp_path / "causal").eval()
    base.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == ["DepthAttnModel"]
    for cls in (DepthAttnForCausalLM, DepthAttnForQuestionAnswering):
        loaded, info = cls.from_pretrained(tmp_path / "base", output_loading_info=True)
        assert {key.partition(".")[0] for key in info["missing_keys"]} <= {"lm_head", "qa_outputs"}
        assert not info["unexpected_keys"]
        with torch.no_grad():
            expected = model.eval().model(ids).last_hidden_state
            assert torch.equal(loaded.eval().base_model(ids).last_hidden_state, expected)


class WithExtraOutput(DepthAttnForCausalLM):
    """A user's subclass, as transformers' users write them."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs["largest_logit"] = outputs.logits.amax()
        return outputs


def test_a_subclass_of_a_user_stands_above_the_host(tmp_path):
    model = WithExtraOutput(DepthAttnConfig.attn_res(tiny_host_config("llama"))).eval()
    outputs = model(random_ids(1, 5), output_depth_attentions=True)
    assert outputs.largest_logit == outputs.logits.max() and len(outputs.depth_attentions) == 7
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["WithExtraOutput"]
    assert isinstance(WithExtraOutput.from_pretrained(tmp_path), LlamaForCausalLM)


@pytest.mark.parametrize("model_type", HOSTS)
def test_forward_has_the_hosts_signature_and_one_argument_more(model_type):
    stock = tiny_stock_model(model_type)
    model = depth_model(stock)
    for ours, theirs in ((model, stock), (model.model, stock.model)):
        found = dict(inspect.signature(ours.forward).parameters)
        added = found.pop("output_depth_attentions")
        assert added.default is None and added.annotation == bool | None
        assert found == dict(inspect.signature(theirs.forward).parameters)


@pytest.mark.parametrize("cls", [DepthAttnModel, DepthAttnForCausalLM, DepthAttnForSequenceClassification])
@pytest.mark.parametrize("choice", ["eager", {"": "eager"}, {"text_config": "eager"}], ids=str)
def test_layers_take_the_implementations_that_are_set(cls, choice):
    """Modules of the host read them from the host's config, masks are made by ours."""
    model = cls(DepthAttnConfig.attn_res(tiny_host_config("qwen3_moe"))).eval()
    assert model.get_experts_implementation() == {"": "grouped_mm", "text_config": "grouped_mm"}
    model.set_experts_implementation(choice)
    model.set_attn_implementation(choice)
    layer = model.base_model.layers[0]
    assert layer.mlp.experts.config._experts_implementation == model.config._experts_implementation == "eager"
    assert layer.self_attn.config._attn_implementation == model.config._attn_implementation == "eager"
    attentions = model(random_ids(1, 5), output_attentions=True).attentions
    assert len(attentions) == 3 and all(weights is not None for weights in attentions)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "mixtral", "exaone"])
def test_loaded_models_can_be_pickled_and_saved_again(model_type, tmp_path):
    """Loaded models keep the renamings of their files."""
    if model_type not in HOSTS:
        pytest.skip(f"this version of transformers has no {model_type}")
    config = DepthAttnConfig.attn_res(tiny_host_config(model_type), **BOTH)
    DepthAttnForCausalLM(config).save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    ids = random_ids(1, 5)
    for number, twin in enumerate((pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded))):
        assert type(twin) is type(loaded) and torch.equal(twin(ids).logits, loaded(ids).logits)
        twin.save_pretrained(tmp_path / str(number))
        files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("a", str(number))]
        assert files[0].keys() == files[1].keys()


@pytest.mark.parametrize("cls", [DepthAttnModel, DepthAttnForCausalLM])
def test_the_config_of_a_host_is_refused(cls):
    with pytest.raises(ValueError, match=r"config: LlamaConfig .*DepthAttnConfig\.attn_res"):
        cls(tiny_host_config("llama"))


@pytest.mark.parametrize("cls", [DepthAttnModel, DepthAttnForCausalLM])
def test_a_subclass_of_the_class_of_a_model_is_used(cls, tmp_path):
    """Libraries make such classes from the model that they are given."""
    config = DepthAttnConfig.attn_res(tiny_host_config("qwen3_moe"), **BOTH)
    ids = random_ids(1, 5)

    class Subclass(type(cls(config))):
        def forward(self, *args, **kwargs):
            return {**super().forward(*args, **kwargs), "extra": 1}

    model = Subclass(config).eval()
    assert isinstance(model, Subclass) and model(ids)["extra"] == 1
    model.save_pretrained(tmp_path)
    loaded, info = Subclass.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found, expected = (next(iter(each.eval()(ids).values())) for each in (loaded, model))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="Subclass is a subclass for the host Qwen3Moe"):
        Subclass(DepthAttnConfig.attn_res(tiny_host_config("llama")))
