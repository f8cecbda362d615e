"""What every connection of the registry must be able to do in a whole model, alone and with MoDA."""

import copy
from pathlib import Path

import pytest
import torch
from connection_cases import CASES, FIELDS, STARTERS, random_case
from model_checks import is_depth_key, randomise_depth, relative_max_error
from processes import run_python
from safetensors.torch import save_file
from tiny_checkpoints import load, logits, save_stock
from tiny_hosts import random_ids, tiny_host_config
from torch import nn
from variants import in_turn

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM, depth_param_groups, lora_config
from hf_depthattn.conversion.restore import restore
from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.depth_connections import CONNECTIONS
from hf_depthattn.depth_options import DEPTH_OPTIONS, DepthConnectionType
from hf_depthattn.errors import UserError
from hf_depthattn.integrations.trainer import is_projection_name, muon_param_groups
from hf_depthattn.model_card import describe_connection

every_case = pytest.mark.parametrize("case", CASES)
# What takes longer runs alone or with MoDA in turn.
_IN_TURN = in_turn(FIELDS, ["", ", MoDA"], every=("residual", "attn_res"))
every_case_in_turn = pytest.mark.parametrize(
    "case", [pytest.param("".join(param.values), marks=param.marks) for param in _IN_TURN]
)
every_connection = pytest.mark.parametrize("connection", FIELDS)


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    # LayerDrop draws random numbers.
    torch.manual_seed(1)
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- training ---


@every_case_in_turn
def test_gradient_checkpointing_keeps_every_gradient(case):
    # In float64, since AttnRes adds in another order under checkpointing.
    model, ids = random_case(case).double().train(), random_ids(2, 9)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable()
    found = gradients(model, ids)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@every_case
def test_depth_parameters_are_never_decayed_and_never_go_to_muon(case):
    model = random_case(case)
    of_depth = {id(p) for name, p in model.named_parameters() if is_depth_key(name) and not is_projection_name(name)}
    decayed = {
        id(p)
        for group in depth_param_groups(model, lr=1.0, weight_decay=0.1)
        if group["weight_decay"]
        for p in group["params"]
    }
    with_muon = {id(p) for group in muon_param_groups(model, lr=1.0) if group["use_muon"] for p in group["params"]}
    assert decayed and with_muon
    assert of_depth.isdisjoint(decayed) and of_depth.isdisjoint(with_muon)


@every_case_in_turn
def test_lora_trains_depth_parameters_and_saves_them(case, tmp_path):
    peft = pytest.importorskip("peft")
    base, ids = random_case(case), random_ids(2, 9)
    fresh, before = copy.deepcopy(base), logits(base, ids)
    model = peft.get_peft_model(base, lora_config(base, r=2))
    in_adapter = {name for name, p in model.named_parameters() if p.requires_grad and is_depth_key(name)}
    assert len(in_adapter) == sum(is_depth_key(name) for name, _ in fresh.named_parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if name in in_adapter}
    for _ in range(2):
        gradients(model.train(), ids)
        optimizer.step()
    moved = {name for name, value in start.items() if not torch.equal(value, model.get_parameter(name))}
    assert bool(moved) == bool(in_adapter)
    expected = logits(model.eval(), ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, tmp_path), ids), expected)


# --- generation, saving and loading ---


@every_case_in_turn
def test_cached_decoding_equals_the_whole_sequence(case):
    model, ids = random_case(case), random_ids(2, 7)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(ids, use_cache=True, **options)
    whole = model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, whole.sequences)
    assert relative_max_error(torch.stack(cached.logits), torch.stack(whole.logits)) < 1e-4


@pytest.mark.parametrize(
    "case, model_type", [*((case, "llama") for case in CASES), *((connection, "mixtral") for connection in FIELDS)]
)
def test_saving_and_loading_is_exact(case, model_type, tmp_path):
    model, ids = random_case(case, model_type), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    # The size of blocks is saved in place of their number.
    for name in {*DEPTH_OPTIONS, "block_size_sublayers"} - {"num_blocks", "sublayers_per_block"}:
        assert getattr(loaded.config, name) == getattr(model.config, name), name


@every_case_in_turn
def test_half_precision_loads_keep_sites_in_float32(case, tmp_path):
    random_case(case).save_pretrained(tmp_path)
    model, reference = load(tmp_path), DepthAttnForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in reference.named_parameters():
        in_float32 = is_depth_key(name) and not is_projection_name(name)
        assert parameter.dtype == (torch.float32 if in_float32 else torch.bfloat16), name
        if in_float32:
            assert torch.equal(parameter, model.get_parameter(name)), name
    assert reference(random_ids(1, 5)).logits.dtype == torch.bfloat16


@every_case_in_turn
def test_reloading_does_not_depend_on_initial_values(case, tmp_path):
    """A fresh model and the same model saved and loaded have the same parameters, those of its initialisation."""
    torch.manual_seed(0)
    model = DepthAttnForCausalLM(DepthAttnConfig(text_config=tiny_host_config("llama"), **CASES[case]))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


@every_connection
def test_description_and_card_name_the_connection(connection, tmp_path):
    model = DepthAttnForCausalLM(DepthAttnConfig(text_config=tiny_host_config("llama"), **FIELDS[connection]))
    words = describe_connection(model.config)
    others = [
        describe_connection(DepthAttnConfig(text_config=tiny_host_config("llama"), **fields))
        for name, fields in FIELDS.items()
        if name != connection
    ]
    assert words and words not in others
    model.save_pretrained(tmp_path)
    card, kind = (tmp_path / "README.md").read_text(), CONNECTIONS[DepthConnectionType(connection)]
    assert words in card and f"`{connection}`" in card
    assert kind.paper in card and f"- {kind.tag}\n" in card if kind.tag else connection == "residual"
    for name, option in DEPTH_OPTIONS.items():
        if connection != "attn_res" and connection in option.connections:
            assert f"| {name} |" in card
    assert "None" not in card, "values in force"
    if connection in DEPTH_OPTIONS["depth_norm_eps"].connections and connection != "attn_res":
        assert f"| depth_norm_eps | `{model.config.text_config.rms_norm_eps}` |" in card


@pytest.mark.parametrize("gate, words", [(None, "none"), ("head", "`head`, zero before training")])
def test_what_a_card_says_of_gates_is_true_before_and_after_training(gate, words, tmp_path):
    config = DepthAttnConfig.moda(tiny_host_config("llama"), depth_gate=gate)
    DepthAttnForCausalLM(config).save_pretrained(tmp_path)
    assert f"| gate | {words} |" in (tmp_path / "README.md").read_text()


_LOAD_ELSEWHERE = """
import sys
from pathlib import Path
sys.modules["hf_depthattn"] = None
import torch, transformers
transformers.logging.set_verbosity_error()
from safetensors.torch import load_file
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    expected = load_file(folder / "expected.st")
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder
print("ok")
"""


@pytest.mark.slow
def test_checkpoints_load_without_the_package(tmp_path):
    (tmp_path / "home").mkdir()
    for connection in FIELDS:
        model, ids, folder = random_case(connection), random_ids(2, 7), tmp_path / "saved" / connection
        model.save_pretrained(folder)
        # Beside the weights, but not with the suffix by which transformers finds them.
        save_file({"ids": ids, "logits": logits(model, ids)}, folder / "expected.st")
    result = run_python("-c", _LOAD_ELSEWHERE, str(tmp_path / "saved"), cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "ok"


# --- conversion ---


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "llama", tokenizer=False)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "mixtral", "mixtral", tokenizer=False)


@pytest.mark.parametrize(
    "connection, host, with_moda",
    in_turn(STARTERS, [("stock", False), ("stock", True), ("mixture", False)], every=("residual", "attn_res")),
)
def test_retrofit_keeps_the_logits_and_restore_gives_the_host_back(connection, host, with_moda, tmp_path, request):
    source, ids = request.getfixturevalue(host), random_ids(2, 9)
    options = {**FIELDS[connection], **({"depth_kv": "attention+mlp"} if with_moda else {})}
    report = retrofit(source, tmp_path / "out", **options)
    expected = logits(load(source), ids)
    model = load(tmp_path / "out")
    assert model.config.connection == connection and report.connection == describe_connection(model.config)
    assert relative_max_error(logits(model, ids), expected) <= 1e-5
    restore(tmp_path / "out", tmp_path / "restored")
    assert torch.equal(logits(load(tmp_path / "restored"), ids), expected)
    if any(is_depth_key(name) for name, _ in model.named_parameters()):
        randomise_depth(model)
        model.save_pretrained(tmp_path / "trained")
        with pytest.raises(UserError, match="depth modules have been trained"):
            restore(tmp_path / "trained", tmp_path / "again")


@pytest.mark.parametrize("connection", sorted(set(FIELDS) - set(STARTERS)))
def test_retrofit_and_restore_refuse_what_is_not_the_host(connection, stock, tmp_path):
    reason = CONNECTIONS[DepthConnectionType(connection)].inexact_reason
    assert reason
    with pytest.raises(UserError) as error:
        retrofit(stock, tmp_path / "out", **FIELDS[connection])
    assert f"connection: '{connection}' does not reproduce the host ({reason})" in str(error.value)
    assert not (tmp_path / "out").exists()
    random_case(connection).save_pretrained(tmp_path / "trained")
    with pytest.raises(UserError) as error:
        restore(tmp_path / "trained", tmp_path / "restored")
    assert f"connection is '{connection}'" in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize("connection", sorted(set(FIELDS) - set(STARTERS)))
def test_what_is_said_not_to_be_the_host_is_not(connection, stock):
    ids, host = random_ids(2, 9), load(stock)
    model = DepthAttnForCausalLM(DepthAttnConfig(text_config=host.config, **FIELDS[connection])).eval()
    model.load_state_dict(host.state_dict(), strict=False)
    assert relative_max_error(logits(model, ids), logits(host, ids)) > 1e-2


# --- compilation ---


@pytest.mark.slow
@every_connection
def test_models_compile_without_graph_breaks(connection):
    model, ids = random_case(connection, host_fields={"num_hidden_layers": 2}), random_ids(2, 7)
    expected = model(ids, use_cache=False).logits
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_max_error(compiled(ids, use_cache=False).logits, expected) < 1e-6
