"""Sources that are more, less or something else than their stock model: `retrofit` and `verify` say so in one line."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_config, save_sparse, save_stock
from tiny_hosts import tiny_host_config, tiny_stock_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_depthattn.checkpoints.checkpoint_files import SINGLE_FILE, TensorEntry
from hf_depthattn.checkpoints.foreign_tensors import OF_AN_ADAPTER, OF_DEPTH, PACKED
from hf_depthattn.checkpoints.weights_check import check_weights
from hf_depthattn.conversion.restore import restore
from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.errors import UserError
from hf_depthattn.eval.verify.verify import verify
from hf_depthattn.host_layouts import supported_hosts

LAYER = "model.layers.1"
PROJECTION = f"{LAYER}.self_attn.q_proj"


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "llama")


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "moe", "qwen3_moe")


def tensors_changed(change):
    def damage(folder: Path) -> None:
        file = folder / SINGLE_FILE
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def added(**tensors):
    return tensors_changed(lambda t: t.update({key.replace("__", "."): value for key, value in tensors.items()}))


def gptq(tensors):
    for name in ("qweight", "qzeros", "g_idx"):
        tensors[f"{PROJECTION}.{name}"] = torch.zeros(3, dtype=torch.int32)
    tensors[f"{PROJECTION}.scales"] = torch.zeros(3)
    del tensors[f"{PROJECTION}.weight"]


def float8(tensors):
    tensors[f"{PROJECTION}.weight"] = tensors[f"{PROJECTION}.weight"].to(torch.float8_e4m3fn)


def lora(tensors):
    tensors[f"{PROJECTION}.base_layer.weight"] = tensors.pop(f"{PROJECTION}.weight")
    tensors[f"{PROJECTION}.lora_A.default.weight"] = torch.zeros(2, 32)


def auto_map(**entries):
    return lambda folder: edit_config(folder, auto_map=entries)


# label -> what is done to a checkpoint, what `retrofit` says, whether `verify` sees it too
FOREIGN = {
    "GPTQ with a config of its own": (
        lambda f: (f / "quantize_config.json").write_text('{"bits": 4}'),
        ["is quantised", "quantize_config.json"],
    ),
    "GPTQ": (tensors_changed(gptq), ["packed by a quantizer", "4 tensors", "g_idx"]),
    "FP8 with scales": (
        tensors_changed(lambda t: (float8(t), t.update({f"{PROJECTION}.weight_scale": torch.ones(1)}))),
        ["packed by a quantizer", f"{PROJECTION}.weight_scale"],
    ),
    "FP8": (tensors_changed(float8), [f"{PROJECTION}.weight", "F8_E4M3", "unquantised"]),
    "integers": (
        tensors_changed(lambda t: t.update({f"{PROJECTION}.weight": torch.zeros(32, 32, dtype=torch.int8)})),
        [f"{PROJECTION}.weight", "I8"],
    ),
    "unmerged LoRA": (tensors_changed(lora), ["adapter that was not merged", "2 tensors", "merge_and_unload"]),
    "PEFT's prefix": (
        tensors_changed(lambda t: t.update({f"base_model.model.{key}": t.pop(key) for key in list(t)})),
        ["adapter that was not merged", "base_model.model."],
    ),
    "adapter folder": (
        lambda f: ((f / "adapter_config.json").write_text("{}"), (f / "config.json").unlink()),
        ["is an adapter", "merge"],
    ),
    "adapter beside the model": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        ["is an adapter", "merge"],
    ),
    "missing tensor": (tensors_changed(lambda t: t.pop(f"{PROJECTION}.weight")), ["lacks", f"{PROJECTION}.weight"]),
    "missing embedding": (tensors_changed(lambda t: t.pop("model.embed_tokens.weight")), ["lacks", "embed_tokens"]),
    "missing norm": (tensors_changed(lambda t: t.pop("model.norm.weight")), ["lacks", "model.norm.weight"]),
    "missing untied head": (tensors_changed(lambda t: t.pop("lm_head.weight")), ["lacks", "lm_head.weight"]),
    "wrong shape": (
        tensors_changed(lambda t: t.update({f"{PROJECTION}.weight": torch.zeros(3, 5)})),
        ["other shapes", f"{PROJECTION}.weight: [3, 5], not [32, 32]"],
    ),
    "another vocabulary": (lambda f: edit_config(f, vocab_size=98), ["other shapes", "[97, 32], not [98, 32]"]),
    "a bias that the config leaves out": (
        added(**{f"{PROJECTION}.bias".replace(".", "__"): torch.ones(32)}),
        ["that LlamaForCausalLM does not have", f"{PROJECTION}.bias"],
    ),
    "fewer layers than there are": (
        lambda f: edit_config(f, num_hidden_layers=2),
        ["that LlamaForCausalLM does not have", "model.layers.2."],
    ),
    "AttnRes of Kimi": (
        added(**{f"{LAYER}.self_attention_res_proj.weight".replace(".", "__"): torch.ones(1, 32)}),
        ["residual scheme", "self_attention_res_proj"],
    ),
    "depth queries of this package": (
        added(model__depth_reads__query=torch.ones(7, 32)),
        ["residual scheme", "depth_reads.query"],
    ),
    "depth queries of this package in sites": (
        added(**{f"{LAYER}.attn_depth.query".replace(".", "__"): torch.ones(32)}),
        ["residual scheme", "attn_depth.query"],
    ),
    "AttnRes field": (lambda f: edit_config(f, attn_res_block_size=6), ["attn_res_block_size=6", "residual scheme"]),
    "AttnRes field of a part": (
        lambda f: edit_config(f, model={"block": {"attnres_block_size": 6}}),
        ["model.block.attnres_block_size=6", "residual scheme", "depthattn import"],
    ),
    "hyper-connections field": (lambda f: edit_config(f, hc_mult=4), ["hc_mult=4", "residual scheme"]),
    "own model code": (
        auto_map(AutoModelForCausalLM="modeling_own.OwnForCausalLM"),
        ["own model code", "modeling_own.OwnForCausalLM", "--ignore-model-code"],
    ),
    "reward model": (
        lambda f: edit_config(f, architectures=["LlamaForRewardModel"]),
        [
            "'LlamaForRewardModel'",
            "not supported with depth attention",
            "LlamaForCausalLM",
            "LlamaForSequenceClassification",
        ],
    ),
    "another model's class": (
        lambda f: edit_config(f, architectures=["Qwen2ForCausalLM"]),
        ["'Qwen2ForCausalLM'", "not supported with depth attention"],
    ),
    "classes that are no names": (lambda f: edit_config(f, architectures=[3]), ["architectures"]),
    "many layers": (lambda f: edit_config(f, num_hidden_layers=90_000), ["90000 layers", "no tensor of layer 3"]),
    "too many layers": (
        lambda f: edit_config(f, num_hidden_layers=10**9),
        ["num_hidden_layers: 1000000000", "more than any model has"],
    ),
    "many heads": (
        lambda f: edit_config(f, num_attention_heads=10**9),
        ["num_attention_heads: 1000000000", "more than any model has"],
    ),
    "negative size": (lambda f: edit_config(f, intermediate_size=-3), ["no model can be built", "-3"]),
    "huge size": (lambda f: edit_config(f, hidden_size=2**60), ["no model can be built"]),
}


@pytest.mark.parametrize("damage, named", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_source_is_refused_in_one_line_by_retrofit_and_verify(damage, named, stock, tmp_path):
    source = Path(shutil.copytree(stock, tmp_path / "source"))
    retrofit(source, tmp_path / "out", copy=True)
    damage(source)
    with pytest.raises(UserError) as error:
        retrofit(source, tmp_path / "new")
    message = str(error.value)
    assert "\n" not in message and all(words in message for words in named), message
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
    # Never that they agree.
    with pytest.raises(UserError) as error:
        verify(source, tmp_path / "out", max_new_tokens=1)
    assert "\n" not in str(error.value)


def test_a_kimi_linear_trained_with_attention_residuals_is_refused(tmp_path):
    """Its config class takes the field, and its model leaves the queries out."""
    source = save_stock(tmp_path / "kimi", "kimi_linear")
    retrofit(source, tmp_path / "out", copy=True)
    added(model__output_attn_res_proj__weight=torch.ones(1, 32))(source)
    for run in (lambda: retrofit(source, tmp_path / "new"), lambda: verify(source, tmp_path / "out")):
        with pytest.raises(UserError, match=r"'model\.output_attn_res_proj\.weight': belongs to a residual scheme"):
            run()


@pytest.mark.parametrize("change", ["connection", "another tensor"])
def test_verify_never_agrees_when_the_output_drops_depth_parameters(change, stock, tmp_path):
    retrofit(stock, tmp_path / "out", num_blocks=2)
    if change == "connection":
        edit_config(tmp_path / "out", connection="residual", num_blocks=None, read_scale="mean")
    else:
        (file,) = (tmp_path / "out").glob("*2-of-*.safetensors")
        tensors = load_file(file) | {"model.layers.9.attn_depth.query": torch.ones(32)}
        save_file(tensors, file, metadata={"format": "pt"})
        index = tmp_path / "out" / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["model.layers.9.attn_depth.query"] = file.name
        index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="depth tensors that the model of its config does not have"):
        verify(stock, tmp_path / "out")


def test_own_model_code_can_be_ignored(stock, tmp_path):
    source = Path(shutil.copytree(stock, tmp_path / "source"))
    auto_map(AutoConfig="configuration_own.Own", AutoModelForCausalLM="modeling_own.Own")(source)
    retrofit(source, tmp_path / "out", ignore_model_code=True)
    assert "modeling_own" not in (tmp_path / "out" / "config.json").read_text()
    assert verify(source, tmp_path / "out", max_new_tokens=2, ignore_model_code=True).ok


def test_a_tokenizer_of_its_own_is_no_model_code(stock, tmp_path):
    source = Path(shutil.copytree(stock, tmp_path / "source"))
    auto_map(AutoTokenizer=["tokenization_own.Own", None])(source)
    retrofit(source, tmp_path / "out")
    assert verify(source, tmp_path / "out", max_new_tokens=2).ok


def test_tensors_of_other_parts_are_named_and_carried_along(stock, tmp_path):
    source = Path(shutil.copytree(stock, tmp_path / "source"))
    added(visual__patch_embed__weight=torch.ones(2), mtp__layers__0__norm__weight=torch.ones(2))(source)
    report = retrofit(source, tmp_path / "out")
    assert report.unused_tensors == ("mtp.layers.0.norm.weight", "visual.patch_embed.weight")
    assert "2 tensors, first mtp.layers.0.norm.weight" in str(report)
    assert verify(source, tmp_path / "out", max_new_tokens=2).ok


def test_the_odd_expert_is_named(moe, tmp_path):
    source = Path(shutil.copytree(moe, tmp_path / "source"))
    odd = f"{LAYER}.mlp.experts.2.down_proj.weight"
    tensors_changed(lambda t: t.update({odd: torch.zeros(7, 9)}))(source)
    with pytest.raises(UserError, match=rf"{odd} has the shape \[7, 9\], but the other experts have \[32, 16\]"):
        retrofit(source, tmp_path / "out")
    tensors_changed(lambda t: t.pop(odd))(source)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.down_proj: \[3, 32, 16\], not \[4, 32, 16\]"):
        retrofit(source, tmp_path / "out")


def test_a_number_of_experts_that_no_model_has_is_not_built(moe, tmp_path):
    source = Path(shutil.copytree(moe, tmp_path / "source"))
    # The second is another name of the first.
    edit_config(source, num_experts=10**9, num_local_experts=10**9)
    with pytest.raises(UserError, match=r"experts: 1000000000 in its config is more than any model has"):
        retrofit(source, tmp_path / "out")


def entries_of(tensors) -> dict[str, TensorEntry]:
    return {name: TensorEntry("F32", tuple(tensor.shape), 0, 0) for name, tensor in tensors.items()}


@pytest.mark.parametrize("model_type", supported_hosts())
def test_every_host_passes_its_own_check_and_misses_what_is_taken_away(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = tiny_host_config(model_type)
    with torch.device("meta"):
        model = tiny_stock_model_on_meta(config)
    entries = entries_of(revert_weight_conversion(model, dict(model.state_dict())))
    assert check_weights("here", config, type(model), entries) == []
    for pattern in (OF_AN_ADAPTER, PACKED, OF_DEPTH):
        assert not any(pattern.search(name) for name in entries)
    missing = next(name for name in sorted(entries) if re.search(r"o_proj|dense|norm|\bln_", name))
    del entries[missing]
    with pytest.raises(UserError, match="lacks tensors of the model"):
        check_weights("here", config, type(model), entries)


def tiny_stock_model_on_meta(config):
    return modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def test_a_checkpoint_of_a_base_model_fits_under_older_names(tmp_path):
    """Tied head left out, keys without `model.`: what transformers loads passes."""
    model = tiny_stock_model("llama", tie_word_embeddings=True)
    with torch.device("meta"):
        tensors = dict(tiny_stock_model_on_meta(model.config).state_dict())
    entries = {name.removeprefix("model."): entry for name, entry in entries_of(tensors).items()}
    del entries["lm_head.weight"]
    assert check_weights("here", model.config, type(model), entries) == []


def test_the_check_is_quick_for_a_large_mixture_of_experts(tmp_path):
    """The real size of a model with 128 experts in 48 layers: 18,867 tensors."""
    source = save_sparse(tmp_path / "large", AutoConfig.for_model("qwen3_moe", num_hidden_layers=48, num_experts=128))
    report = retrofit(source, tmp_path / "out")
    # Measured: 1.6 s of one core.
    assert report.seconds < 20 and report.bytes_linked > 1e10


# --- links and code ---


def test_a_link_out_of_the_source_is_refused(stock, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for name in ("notes.txt", "config.json", "README.md", SINGLE_FILE, "additional_chat_templates/tool.jinja"):
        source = Path(shutil.copytree(stock, tmp_path / "source"))
        link = source / name
        link.parent.mkdir(exist_ok=True)
        content = link.read_bytes() if link.exists() else b"secret"
        link.unlink(missing_ok=True)
        secret.write_bytes(content)
        link.symlink_to("../secret.txt" if link.parent == source else secret)
        with pytest.raises(UserError, match=r"is a link to .*secret\.txt, outside of"):
            retrofit(source, tmp_path / "out")
        shutil.rmtree(source)


def test_a_link_inside_the_source_is_followed(stock, tmp_path):
    source = Path(shutil.copytree(stock, tmp_path / "source"))
    (source / "COPYING").write_text("terms")
    (source / "LICENSE").symlink_to("COPYING")
    retrofit(source, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms" and not (tmp_path / "out" / "LICENSE").is_symlink()


@pytest.mark.parametrize(
    "code", [["tokenization_own.Own", None], ["someone/else--tokenization_own.Own", None]], ids=str
)
def test_tokenizer_code_needs_leave(code, stock, tmp_path):
    source = Path(shutil.copytree(stock, tmp_path / "source"))
    (source / "tokenization_own.py").write_text("class Own: ...\n")
    tokenizer_config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"auto_map": {"AutoTokenizer": code}}))
    named = code[0] if "--" in code[0] else "tokenization_own.py"
    with pytest.raises(UserError, match=f"{named}.*--copy-tokenizer-code"):
        retrofit(source, tmp_path / "out")
    report = retrofit(source, tmp_path / "out", copy_tokenizer_code=True)
    assert report.tokenizer_code == (named,) and named in str(report)
    with pytest.raises(UserError, match="--copy-tokenizer-code"):
        restore(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize(
    "auto_map", [3, [], {"AutoTokenizer": 3}, {"AutoTokenizer": [3]}, {"AutoTokenizer": {}}], ids=str
)
def test_nonsense_in_the_tokenizer_is_no_code(auto_map, stock, tmp_path):
    source = Path(shutil.copytree(stock, tmp_path / "source"))
    tokenizer_config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"auto_map": auto_map}))
    assert retrofit(source, tmp_path / "out").tokenizer_code == ()


# --- parts of multimodal models ---


@pytest.mark.parametrize("model_type", ["gemma3", "llama4", "gemma4", "qwen3_5", "glm4v", "gemma3n", "llava"])
def test_a_multimodal_model_is_refused_with_what_to_do(model_type, tmp_path):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError) as error:
        retrofit(tmp_path / "source", tmp_path / "out")
    message = str(error.value)
    assert f"{model_type!r} is a multimodal model" in message and "config.text_config`" not in message
    assert "text.save_pretrained(FOLDER)" in message or "cannot be a host" in message
    assert len(message) < 600


def test_the_language_model_of_a_multimodal_model_can_be_retrofitted(tmp_path):
    """By the lines of the message."""
    from transformers import AutoModelForImageTextToText, Gemma3Config

    text = tiny_host_config("gemma3_text").to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    whole = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    AutoModelForImageTextToText.from_config(whole).save_pretrained(tmp_path / "SOURCE")
    with pytest.raises(UserError) as error:
        retrofit(tmp_path / "SOURCE", tmp_path / "out")
    code = str(error.value).partition("retrofit it: ")[2]
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoModelForImageTextToText": AutoModelForImageTextToText}
    names |= {"SOURCE": tmp_path / "SOURCE", "FOLDER": tmp_path / "FOLDER"}
    exec(code, names)
    retrofit(tmp_path / "FOLDER", tmp_path / "out")
    assert verify(tmp_path / "FOLDER", tmp_path / "out", require_tokenizer=False, max_new_tokens=2).ok


#: Hosts for which transformers has a class of another host -> what their own code, and so their `architectures`, says.
BORROWED = {
    "exaone": "ExaoneForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "iquestcoder": "IQuestCoderForCausalLM",
    "sarvam_mla": "SarvamMLAForCausalLM",
    "sarvam_moe": "SarvamMoEForCausalLM",
}


@pytest.mark.parametrize("model_type", BORROWED)
def test_a_class_that_transformers_has_under_another_name_is_known(tmp_path, model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    source = save_stock(tmp_path / "stock", model_type)
    edit_config(source, architectures=[BORROWED[model_type]])
    assert retrofit(source, tmp_path / "depth").architecture == "DepthAttnForCausalLM"
    assert verify(source, tmp_path / "depth").ok
    # Saved again, the tensors have the names of the host's files, ours as well.
    AutoModelForCausalLM.from_pretrained(tmp_path / "depth").save_pretrained(tmp_path / "again")
    restore(tmp_path / "again", tmp_path / "back")
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert restored.keys() == expected.keys() and all(torch.equal(restored[key], expected[key]) for key in expected)


def test_a_reward_model_of_such_a_host_is_refused(tmp_path):
    if "internlm3" not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no internlm3")
    source = save_stock(tmp_path / "stock", "internlm3")
    edit_config(source, architectures=["InternLM3ForRewardModeling"])
    with pytest.raises(UserError, match="is not supported with depth attention"):
        retrofit(source, tmp_path / "depth")
