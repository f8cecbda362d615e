"""The models behave as transformers' own: checkpointing, compilation, dtypes, placement, outputs."""

import functools
import json
import pickle

import pytest
import torch
from depth_forms import FORMS, every_form, random_model
from huggingface_hub.errors import StrictDataclassError
from model_checks import depth_model, is_depth_key, randomise_depth, relative_max_error
from repository import ROOT
from tiny_hosts import NUM_LAYERS, VOCAB_SIZE, needs_kimi_linear, random_ids, tiny_host_config, tiny_stock_model
from torch.utils import checkpoint as torch_checkpoint
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_depthattn import (
    DepthAttnConfig,
    DepthAttnForCausalLM,
    DepthAttnForQuestionAnswering,
    DepthAttnForSequenceClassification,
    DepthAttnForTokenClassification,
    DepthAttnModel,
)


def gradients(model, ids) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- activation checkpointing ---


@every_form
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}, {}])
def test_checkpointing_gives_identical_gradients_once_per_layer(fields, options, monkeypatch):
    model, ids = random_model(**fields).train(), random_ids(2, 9)
    # Grouped reads end with a checkpointed layer and then round differently: `test_attn_res_schedule`.
    model.config.attn_res_schedule = "single"
    expected = gradients(model, ids)
    calls = []
    original = torch_checkpoint.checkpoint

    def counting(function, *args, **kwargs):
        calls.append(kwargs.get("use_reentrant"))
        return original(function, *args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counting)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    actual = gradients(model, ids)
    assert calls == [False] * NUM_LAYERS
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name
    model.gradient_checkpointing_disable()
    gradients(model, ids)
    assert len(calls) == NUM_LAYERS


def test_a_training_step_saves_each_source_once():
    """What a step keeps grows with the number of sources, not with its square."""

    def saved_bytes(num_layers):
        model = depth_model(tiny_stock_model("llama", num_hidden_layers=num_layers), sublayers_per_block=1).train()
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(random_ids(2, 32), use_cache=False).logits.sum()
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        total = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)
        del loss
        return total

    four, eight, sixteen = saved_bytes(4), saved_bytes(8), saved_bytes(16)
    # Depth weights are the quadratic part, one number per source and token; a stack of sources would be 32 times that.
    assert 0 < (sixteen - eight) < 2.3 * (eight - four)


# --- compilation ---


@pytest.mark.parametrize(
    "form",
    [
        "moda-gate-block2",
        pytest.param("block2-sum", marks=pytest.mark.slow),
        pytest.param("full", marks=pytest.mark.slow),
        pytest.param("moda", marks=pytest.mark.slow),
    ],
)
def test_fullgraph_compile_forward_and_backward(form):
    torch._dynamo.reset()
    model = random_model(**FORMS[form])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (6, 9):
        ids = random_ids(2, length)
        expected = model(ids, labels=ids, use_cache=False)
        actual = compiled(ids, labels=ids, use_cache=False)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
        expected_gradients = torch.autograd.grad(expected.loss, list(model.parameters()))
        actual_gradients = torch.autograd.grad(actual.loss, list(model.parameters()))
        for a, e in zip(actual_gradients, expected_gradients, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["block2-sum", "moda-gate-block2"])
def test_fullgraph_compile_with_inductor(form):
    torch._dynamo.reset()
    model = random_model(**FORMS[form])
    ids = random_ids(2, 9)
    with torch.no_grad():
        actual = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(actual, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


# --- dtypes and placement ---


def is_kept_in_float32(name: str) -> bool:
    return is_depth_key(name) and "mlp_depth_kv" not in name


@pytest.mark.parametrize("form", ["block2-sum", "moda-gate-block2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inference_keeps_depth_parameters_in_float32(dtype, form, tmp_path):
    model = random_model(**FORMS[form])
    model.save_pretrained(tmp_path)
    ids = random_ids(2, 8)
    loaded = DepthAttnForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for half in (loaded, random_model(**FORMS[form]).to(dtype)):
        for name, parameter in half.named_parameters():
            assert parameter.dtype == (torch.float32 if is_kept_in_float32(name) else dtype), name
        assert half(ids).logits.dtype == dtype
    with torch.no_grad():
        assert relative_max_error(loaded(ids).logits.float(), model(ids).logits) < 0.1
    generated = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 11)


@every_form
def test_autocast_training_is_close_to_float32(fields):
    """Embeddings stay float32 under autocast and sublayer outputs do not."""
    # A fixed model: how far bfloat16 turns the gradients depends on the weights.
    torch.manual_seed(0)
    model, ids = random_model(**fields).train(), random_ids(2, 9)
    expected = gradients(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(model, ids)
    assert actual.keys() == expected.keys()
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (actual, expected)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.97


def test_fresh_and_reloaded_models_start_from_the_documented_values(tmp_path):
    """Also when the checkpoint has no depth parameters, and when it is built on the meta device first."""
    stock = tiny_stock_model("llama")
    stock.save_pretrained(tmp_path)
    host = tiny_host_config("llama")
    config = DepthAttnConfig(text_config=host, query="input", depth_kv="attention+mlp", depth_gate="head")
    for model in (DepthAttnForCausalLM(config), DepthAttnForCausalLM.from_pretrained(tmp_path, config=config)):
        for name, parameter in model.named_parameters():
            if is_kept_in_float32(name):
                value = 1.0 if "key_norm" in name else 0.0
                assert torch.equal(parameter, torch.full_like(parameter, value)), name
            elif is_depth_key(name):
                assert parameter.std().item() == pytest.approx(host.initializer_range, rel=0.2), name


def test_training_is_not_undone_by_a_second_initialisation():
    model = random_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("form", ["full", "moda-gate-block2"])
@pytest.mark.parametrize("offloaded", ["disk", "cpu"])
def test_offloaded_layers_give_the_same_logits(offloaded, form, tmp_path):
    """Layers on different devices: accelerate's hooks place weights and move what the layers exchange."""
    pytest.importorskip("accelerate")
    from accelerate import cpu_offload, disk_offload

    model, ids = random_model(**FORMS[form]), random_ids(2, 8)
    with torch.no_grad():
        expected = model(ids).logits
        expected_single = model(ids, output_depth_attentions=True).logits
        if offloaded == "disk":
            disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        else:
            cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids, output_depth_attentions=True).logits, expected_single)


@pytest.mark.parametrize("form", ["block2-sum", "moda-gate-block2"])
def test_device_map_with_disk_offload(form, tmp_path):
    pytest.importorskip("accelerate")
    model, ids = random_model(**FORMS[form]), random_ids(2, 8)
    model.save_pretrained(tmp_path / "saved")
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    device_map |= {"model.depth_reads": "disk", "lm_head": "cpu"}
    loaded = DepthAttnForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("config", [DistributedConfig(pp_size=2), {"pp_size": 2}], ids=["config", "dict"])
def test_pipeline_stages_of_transformers_are_refused(config, tmp_path):
    random_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"distributed_config: pp_size=2 .* `hf_depthattn.distributed`"):
        AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=config)


def test_no_split_modules_name_our_layer():
    assert "DepthAttnDecoderLayer" in random_model()._no_split_modules


# --- embeddings ---


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied):
    model = random_model(host_fields={"tie_word_embeddings": tied}, sublayers_per_block=2)
    model.resize_token_embeddings(VOCAB_SIZE + 11)
    assert model.config.vocab_size == model.config.text_config.vocab_size == VOCAB_SIZE + 11
    assert model.get_input_embeddings().num_embeddings == VOCAB_SIZE + 11
    output = model(torch.full((1, 4), VOCAB_SIZE + 5), labels=torch.full((1, 4), VOCAB_SIZE + 5))
    assert output.logits.shape == (1, 4, VOCAB_SIZE + 11)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


# --- outputs ---


def test_inputs_embeds_and_logits_to_keep():
    model, ids = random_model(sublayers_per_block=2), random_ids(2, 8)
    with torch.no_grad():
        logits = model(ids).logits
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert torch.equal(embedded, logits)
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])


def test_hidden_states_are_what_the_layers_read():
    model, ids = random_model(sublayers_per_block=1), random_ids(2, 8)
    read = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        base = model.model(ids).last_hidden_state
    assert len(output.hidden_states) == NUM_LAYERS + 1
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    for hidden, layer_input in zip(output.hidden_states[:-1], read[:NUM_LAYERS], strict=True):
        assert torch.equal(hidden, layer_input)
    assert torch.equal(output.hidden_states[-1], base)


def test_output_attentions_have_the_shape_of_the_host():
    model, ids = random_model(host_fields={"attn_implementation": "eager"}), random_ids(2, 8)
    attentions = model(ids, output_attentions=True).attentions
    assert [tuple(a.shape) for a in attentions] == [(2, 4, 8, 8)] * NUM_LAYERS


@pytest.mark.parametrize(
    "model_class",
    [
        DepthAttnModel,
        DepthAttnForCausalLM,
        DepthAttnForSequenceClassification,
        DepthAttnForTokenClassification,
        DepthAttnForQuestionAnswering,
    ],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_depth_attentions_of_every_site(model_class, checkpointed):
    config = DepthAttnConfig(text_config=tiny_host_config("llama"), sublayers_per_block=2, num_depth_heads=2)
    model = model_class(config).train()
    randomise_depth(model)
    if checkpointed:
        model.gradient_checkpointing_enable()
    ids = random_ids(2, 8)
    output = model(ids, output_depth_attentions=True, use_cache=False)
    assert len(output.depth_attentions) == 2 * NUM_LAYERS + 1
    for site, weights in enumerate(output.depth_attentions):
        assert weights.shape == (2, 8, 2, config.num_sources(site))
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 8, 2))
    assert not hasattr(model(ids), "depth_attentions") or model(ids).depth_attentions is None
    as_tuple = model(ids, output_depth_attentions=True, use_cache=False, return_dict=False)
    assert len(as_tuple[-1]) == 2 * NUM_LAYERS + 1


def test_depth_attentions_are_the_weights_that_were_used():
    """The embedding's share, undone by hand at a site of a Full model."""
    model, ids = random_model(sublayers_per_block=1), random_ids(1, 6)
    reads = {}
    model.model.layers[1].attn_depth.register_forward_pre_hook(lambda m, args: reads.update(state=args[0]))
    model.model.layers[1].attn_depth.register_forward_hook(lambda m, args, output: reads.update(h=output[0]))
    with torch.no_grad():
        weights = model(ids, output_depth_attentions=True).depth_attentions[2]
    sources = torch.stack([*reads["state"].sources, reads["state"].partial], dim=-1)
    torch.testing.assert_close((sources * weights).sum(-1), reads["h"], rtol=1e-5, atol=1e-6)


# --- construction at scale ---


def test_auto_classes_build_from_config():
    model = AutoModelForCausalLM.from_config(DepthAttnConfig.attn_res(tiny_host_config("qwen3")))
    assert isinstance(model, DepthAttnForCausalLM)


@every_form
def test_deepcopy_and_state_dict_round_trip(fields):
    import copy

    model, ids = random_model(**fields), random_ids(1, 6)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    twin.set_attn_implementation("sdpa")
    assert torch.equal(twin(ids).logits, model(ids).logits)
    fresh = DepthAttnForCausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(ids).logits, model(ids).logits)


def test_attention_implementation_is_the_hosts_choice():
    for implementation in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_config(
            DepthAttnConfig.attn_res(tiny_host_config("llama")), attn_implementation=implementation
        )
        assert model.config._attn_implementation == implementation
        assert model.config.text_config._attn_implementation == implementation
    model.set_attn_implementation("eager")
    assert model.config.text_config._attn_implementation == "eager"


def test_layers_are_called_as_layers():
    """Hooks of layers run, which sharding, offloading and recorders rely on."""
    model, ids = random_model(), random_ids(1, 5)
    called = []
    for layer in model.model.layers:
        layer.register_forward_hook(functools.partial(lambda i, *_: called.append(i), layer.layer_idx))
    model(ids)
    assert called == list(range(NUM_LAYERS))


@needs_kimi_linear
def test_kimi_linear_at_the_size_of_the_paper():
    """27 layers, 48B-A3B, three decoder layers per block, ten sources at the output site."""
    config = DepthAttnConfig.from_pretrained(ROOT / "examples" / "configs" / "kimi_linear_48b_a3b_attn_res")
    with torch.device("meta"):
        model = DepthAttnForCausalLM(config)
    assert len(model.model.layers) == 27
    assert [config.num_sources(6 * block) for block in range(10)] == list(range(1, 11))
    assert 48e9 < sum(parameter.numel() for parameter in model.parameters()) < 50e9
    depth = sum(parameter.numel() for name, parameter in model.named_parameters() if is_depth_key(name))
    assert depth == 2 * (2 * 27 + 1) * 2304


def test_no_pipeline_plan_is_offered():
    """A stage would send one tensor where the depth state is many."""
    assert not random_model().supports_pp_plan


# --- what users do to models ---


class UsersCausalLM(DepthAttnForCausalLM):
    """A subclass outside the package."""


class UsersClassifier(DepthAttnForSequenceClassification):
    """The same for a head of ours."""


@pytest.mark.parametrize("model_class", [UsersCausalLM, UsersClassifier])
def test_subclasses_of_users_save_and_load(model_class, tmp_path):
    model = model_class(DepthAttnConfig(text_config=tiny_host_config("llama"))).eval()
    randomise_depth(model)
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = random_ids(1, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_registered_subclasses_of_users_export_themselves(tmp_path):
    """transformers' own export stays in place for a class that is not ours."""
    model = UsersCausalLM(DepthAttnConfig(text_config=tiny_host_config("llama")))
    UsersCausalLM.register_for_auto_class("AutoModelForCausalLM")
    try:
        model.save_pretrained(tmp_path)
    finally:
        UsersCausalLM._auto_class = None
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"].endswith("test_modeling_depthattn.UsersCausalLM")
    assert auto_map["AutoModel"] == "modeling_depthattn.DepthAttnModel"
    assert (tmp_path / "test_modeling_depthattn.py").exists()


def test_saving_keeps_other_entries_of_auto_map_and_leaves_the_config_as_it_was(tmp_path):
    model = random_model()
    model.config.auto_map = {"AutoTokenizer": ["tokenization_x.X", None]}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved["AutoTokenizer"] == ["tokenization_x.X", None]
    assert "AutoModel" in saved
    assert model.config.auto_map == {"AutoTokenizer": ["tokenization_x.X", None]}


@pytest.mark.parametrize("form", ["full", "moda-gate-block2"])
@pytest.mark.parametrize("model_type", ["llama", "smollm3"])
def test_models_can_be_pickled_and_record_hidden_states_afterwards(model_type, form):
    model, ids = random_model(model_type, **FORMS[form]), random_ids(1, 5)
    twin = pickle.loads(pickle.dumps(model))
    for a, b in zip(
        twin(ids, output_hidden_states=True).hidden_states,
        model(ids, output_hidden_states=True).hidden_states,
        strict=True,
    ):
        assert torch.equal(a, b)


def test_assigning_a_head_replaces_the_hosts():
    model, ids = random_model(), random_ids(1, 5)
    model.lm_head = torch.nn.Linear(32, VOCAB_SIZE, bias=False)
    assert model.get_output_embeddings() is model.lm_head
    assert torch.equal(model(ids).logits, model.lm_head(model.model(ids).last_hidden_state))


def test_changes_of_the_config_after_construction_are_checked_when_a_model_is_built():
    config = DepthAttnConfig(text_config=tiny_host_config("llama"))
    config.num_blocks = 50
    with pytest.raises(StrictDataclassError, match="num_blocks"):
        DepthAttnForCausalLM(config)


def test_single_source_is_read_as_it_is_with_a_sigmoid_too():
    for static_mix in (False, True):
        model = random_model(depth_activation="sigmoid", static_mix=static_mix)
        ids = random_ids(1, 5)
        hidden_states = model(ids, output_hidden_states=True).hidden_states
        assert torch.equal(hidden_states[0], model.get_input_embeddings()(ids))


def test_input_dependent_queries_are_float32_under_autocast():
    model, seen = random_model(query="input"), []
    model.model.layers[1].attn_depth.query_proj.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_ids(1, 5))
    assert seen == [torch.float32]


def test_reentrant_checkpointing_behind_our_back_is_explained():
    model = random_model().train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(torch_checkpoint.checkpoint, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(random_ids(1, 5), use_cache=False)
