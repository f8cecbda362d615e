"""lm-eval's model class on real items with a real small checkpoint, stock and retrofitted."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")

import torch
from damaged_checkpoints import DAMAGE, edit_tensors
from harness_runs import LIKELIHOOD, model_of, responses, run
from tiny_checkpoints import edit_config, save_stock
from transformers import AutoModelForCausalLM

from hf_depthattn.checkpoints.model_loading import load_model
from hf_depthattn.errors import UserError
from hf_depthattn.eval.harness.model import DepthAttnLM

RELATIVE = 1e-5


@pytest.mark.parametrize("name", ["attn_res", "moda", pytest.param("both", marks=pytest.mark.slow)])
def test_retrofit_answers_every_item_like_the_stock_checkpoint(checkpoints, stock_results, name):
    results = run(model_of(checkpoints[name], batch_size=8), LIKELIHOOD)
    assert results["config"]["model_num_parameters"] > stock_results["config"]["model_num_parameters"]
    expected, got = responses(stock_results), responses(results)
    assert expected.keys() == got.keys()
    worst = max(abs(got[key] / expected[key] - 1) for key in expected)
    assert worst <= RELATIVE
    assert results["results"].keys() == stock_results["results"].keys()


@pytest.mark.parametrize("name", ["attn_res", "moda"])
def test_right_padded_batches_equal_single_requests(checkpoints, stock_results, name):
    # Trained values: with queries and gates of zero, depth attention could not read a wrong token. float64 leaves
    # nothing to rounding, which differs between batch sizes.
    model = model_of(checkpoints[name], batch_size=8, dtype="float64")
    torch.manual_seed(0)
    for parameter_name, parameter in model.model.named_parameters():
        if parameter_name.endswith((".query", ".gate")) or "depth" in parameter_name:
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    tasks = ["copa_local", "arc_easy_local"]
    batched = responses(run(model, tasks, limit=8))
    model.batch_size_per_gpu = 1
    single = responses(run(model, tasks, limit=8))
    assert max(abs(batched[key] / single[key] - 1) for key in single) <= 1e-12
    stock = responses(stock_results)
    assert max(abs(batched[key] / stock[key] - 1) for key in single) > 1e-3, "the change does not show"


def test_log_likelihoods_build_no_cache(checkpoints, monkeypatch):
    model = model_of(checkpoints["both"], batch_size=8)
    seen = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: seen.append(forward(*a, **k)) or seen[-1])
    run(model, ["copa_local"], limit=2)
    assert seen and all(output.past_key_values is None for output in seen)


def test_answer_longer_than_the_context_is_refused(checkpoints):
    model = DepthAttnLM(pretrained=str(checkpoints["stock"]), device="cpu", max_length=16)
    with pytest.raises(ValueError, match=r"max_length=16: an answer has \d+ tokens .*--max-length"):
        run(model, ["arc_easy_local"], limit=5)
    with pytest.raises(ValueError, match=r"max_length=16: 256 tokens are to be generated .*--max-length"):
        run(model, ["triviaqa_local"], limit=1)


def test_truncated_prompts_are_counted(checkpoints, capsys):
    model = DepthAttnLM(pretrained=str(checkpoints["stock"]), device="cpu", max_length=128)
    run(model, ["boolq_local"], limit=3)
    # Two answers to each of three long passages.
    assert model.num_truncated_prompts == 6
    assert "warning: 6 prompts were longer than max_length=128 allows" in capsys.readouterr().err


def test_adapter_is_applied(checkpoints, stock_results, tmp_path):
    peft = pytest.importorskip("peft")
    from hf_depthattn import lora_config

    model = AutoModelForCausalLM.from_pretrained(checkpoints["both"])
    adapted = peft.get_peft_model(model, lora_config(model))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    results = run(model_of(checkpoints["both"], peft=str(tmp_path / "adapter"), batch_size=8), ["copa_local"])
    changed, stock = responses(results), responses(stock_results)
    assert max(abs(changed[key] / stock[key] - 1) for key in changed) > 1e-3


def request(context: str, continuation: str):
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)


@pytest.mark.parametrize("label", [label for label in DAMAGE if label != "another shape"])
def test_refuses_a_wrong_checkpoint(tmp_path, label):
    folder = save_stock(tmp_path / "model")
    edit, fields, message = DAMAGE[label]
    edit_tensors(folder, edit)
    edit_config(folder, **fields)
    with pytest.raises(UserError, match=message):
        DepthAttnLM(str(folder), device="cpu")


@pytest.mark.parametrize("device", ["banana", "meta"])
def test_takes_no_other_device(tmp_path, device):
    with pytest.raises(UserError, match=f"device: '{device}' "):
        DepthAttnLM(str(save_stock(tmp_path / "model")), device=device)


def test_refuses_token_ids_beyond_the_vocabulary(tmp_path):
    model = DepthAttnLM(str(save_stock(tmp_path / "model", vocab_size=40)), device="cpu")
    assert len(model.loglikelihood([request("abc", "d")])) == 1
    with pytest.raises(UserError, match=r"/model: its tokenizer returns token id 4., but the model has only 40"):
        model.loglikelihood([request("abc", "RST")])


def test_refuses_an_adapter_without_a_place(tmp_path):
    peft = pytest.importorskip("peft")
    folder, deeper = save_stock(tmp_path / "model"), save_stock(tmp_path / "deeper", num_hidden_layers=4)
    for base in (folder, deeper):
        adapted = peft.get_peft_model(load_model(base), peft.LoraConfig(r=2, target_modules=["up_proj"]))
        adapted.save_pretrained(tmp_path / f"adapter of {base.name}")
    assert DepthAttnLM(str(folder), device="cpu", peft=str(tmp_path / "adapter of model")).loglikelihood(
        [request("abc", "d")]
    )
    with pytest.raises(UserError, match=r"adapter of deeper: LlamaForCausalLM does not have 2 of its tensors"):
        DepthAttnLM(str(folder), device="cpu", peft=str(tmp_path / "adapter of deeper"))
    with pytest.raises(UserError, match=r"adapter of model: lacks 2 tensors of its layers"):
        DepthAttnLM(str(deeper), device="cpu", peft=str(tmp_path / "adapter of model"))
