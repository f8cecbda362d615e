"""A PEFT config without `target_modules` adapts what it adapts in the host, and needs no import of ours for that."""

import pytest
from model_checks import depth_model, is_depth_key
from processes import run_python
from tiny_hosts import tiny_stock_model

from hf_depthattn import DepthAttnForCausalLM

peft = pytest.importorskip("peft")

BOTH = {"num_blocks": 2, "depth_kv": "attention+mlp"}
METHODS = {
    "LoRA": peft.LoraConfig,
    "DoRA": lambda **kwargs: peft.LoraConfig(use_dora=True, **kwargs),
    "AdaLoRA": lambda **kwargs: peft.AdaLoraConfig(total_step=10, **kwargs),
    "VeRA": peft.VeraConfig,
    "IA3": peft.IA3Config,
    "LoHa": peft.LoHaConfig,
    "LayerNorm tuning": peft.LNTuningConfig,
}


def adapted_modules(model) -> set[str]:
    layers = (
        name for name, module in model.named_modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    )
    return {name for name in layers if not is_depth_key(f"{name}.")}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", ["llama", "qwen3", "gemma2"])
def test_defaults_are_those_of_the_host(host, method):
    stock = tiny_stock_model(host)
    model = depth_model(stock, **BOTH)
    config = METHODS[method](task_type="CAUSAL_LM")
    try:
        expected = adapted_modules(peft.get_peft_model(stock, config))
    except ValueError as error:
        pytest.skip(f"PEFT has no default for this host: {error}")
    found = adapted_modules(peft.get_peft_model(model, METHODS[method](task_type="CAUSAL_LM")))
    assert found and found == expected


def test_hosts_that_peft_does_not_know_have_a_default_too():
    model = depth_model(tiny_stock_model("smollm3"), **BOTH)
    found = adapted_modules(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")))
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "v_proj"}


def test_models_of_several_hosts_have_their_own_defaults():
    models = [depth_model(tiny_stock_model(host), **BOTH) for host in ("llama", "phi3", "llama")]
    for model, expected in zip(models, ({"q_proj", "v_proj"}, {"qkv_proj"}, {"q_proj", "v_proj"}), strict=True):
        found = adapted_modules(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")))
        assert {name.rpartition(".")[2] for name in found} == expected


_ADAPT = """
import sys
if len(sys.argv) > 2:
    import hf_depthattn
else:
    sys.modules["hf_depthattn"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=len(sys.argv) == 2)
assert "peft" not in sys.modules
from peft import LoraConfig, get_peft_model
get_peft_model(model, LoraConfig())
assert "hf_depthattn.integrations.peft" not in sys.modules
print("ok")
"""


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False], ids=["installed", "remote code"])
def test_they_exist_in_a_process_that_only_used_auto_classes(installed, tmp_path):
    from repository import ROOT

    DepthAttnForCausalLM(depth_model(tiny_stock_model("llama"), **BOTH).config).save_pretrained(tmp_path / "model")
    (tmp_path / "home").mkdir()
    result = run_python(
        *("-c", _ADAPT, str(tmp_path / "model"), *(["installed"] if installed else [])),
        cwd=tmp_path / "home",
        python_path=str(ROOT) if installed else "",
        HF_HOME=str(tmp_path / "home"),
    )
    assert result.stdout.strip() == "ok", result.stderr[-3000:]
