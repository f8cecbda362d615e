"""TRL's trainers on retrofitted models: they start at the host's loss, train depth modules, and save what loads."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from model_checks import depth_model, is_depth_key
from tiny_checkpoints import save_tokenizer
from tiny_hosts import random_ids, tiny_stock_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM, DepthAttnForSequenceClassification, lora_config

# Imported by name: the package is only an extra.
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

# What leaves a host's function as it is: sums, zero queries, closed gates.
SCHEMES = {
    "attn_res": {"num_blocks": 2, "read_scale": "sum"},
    "moda": {"connection": "residual", "depth_kv": "attention+mlp", "depth_gate": "head"},
    "both": {"num_blocks": 2, "read_scale": "sum", "depth_kv": "attention+mlp", "depth_gate": "head"},
}
ADAPTERS = ("full", "lora_config", "plain LoraConfig")
KINDS = ("sft", "chat", "packing", "dpo", "kto", "grpo", "reward")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEXTS = ["def add(a, b): return a + b", "x = 1", "for i in range(10): print(i)", "import os"] * 2


def rows(kind: str):
    """The smallest data set that a trainer takes."""
    if kind in ("sft", "packing"):
        columns = {"text": TEXTS}
    elif kind == "chat":
        columns = {
            "messages": [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": t}] for t in TEXTS]
        }
    elif kind in ("dpo", "reward"):
        columns = {"prompt": ["say "] * 8, "chosen": TEXTS, "rejected": [text[::-1] for text in TEXTS]}
    elif kind == "kto":
        columns = {"prompt": ["say "] * 8, "completion": TEXTS, "label": [True, False] * 4}
    else:
        columns = {"prompt": ["say ", "x = ", "for", "im"] * 2}
    return datasets.Dataset.from_dict(columns)


def num_different_characters(completions, **kwargs) -> list[float]:
    """A reward for GRPO."""
    return [float(len(set(text))) for text in completions]


def make_trainer(kind: str, model, out: Path, peft_config=None):
    """A trainer for two steps; `model` is a model or a folder."""
    common = {
        "output_dir": str(out),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    arguments = {"model": model, "train_dataset": rows(kind), "peft_config": peft_config}
    if not isinstance(model, str):
        arguments["processing_class"] = AutoTokenizer.from_pretrained(model.name_or_path)
    if kind == "grpo":
        args = trl.GRPOConfig(**common, max_completion_length=8, num_generations=4, beta=0.1)
        return trl.GRPOTrainer(args=args, reward_funcs=num_different_characters, **arguments)
    trainer, config = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }.get(kind, (trl.SFTTrainer, trl.SFTConfig))
    if kind == "packing":
        common["packing"] = True
    return trainer(args=config(**common, max_length=48), **arguments)


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def auto_class(kind: str):
    return AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Folders `host` and one per scheme, causal models and, in `reward`, reward models; all of one function."""
    root = tmp_path_factory.mktemp("trl")
    torch.manual_seed(0)
    stock = tiny_stock_model("llama")
    models = {"host": stock} | {scheme: depth_model(stock, **fields) for scheme, fields in SCHEMES.items()}
    reward_config = copy.deepcopy(stock.config)
    reward_config.num_labels = 1
    reward_host = AutoModelForSequenceClassification.from_config(reward_config)
    rewards = {"host": reward_host}
    for scheme, fields in SCHEMES.items():
        rewards[scheme] = DepthAttnForSequenceClassification(DepthAttnConfig(text_config=reward_config, **fields))
        result = rewards[scheme].load_state_dict(reward_host.state_dict(), strict=False)
        assert not result.unexpected_keys and all(is_depth_key(key) for key in result.missing_keys)
    for folder, kind_of_models in ((root, models), (root / "reward", rewards)):
        for name, model in kind_of_models.items():
            model.save_pretrained(folder / name)
            save_tokenizer(folder / name)
            tokenizer_config = json.loads((folder / name / "tokenizer_config.json").read_text())
            tokenizer_config["chat_template"] = CHAT_TEMPLATE
            (folder / name / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return root


def folder_of(checkpoints: Path, kind: str, name: str) -> Path:
    return checkpoints / "reward" / name if kind == "reward" else checkpoints / name


_FIRST_LOSS_OF_HOST: dict[str, float] = {}


def first_loss_of_host(kind: str, checkpoints: Path, out: Path) -> float:
    if kind not in _FIRST_LOSS_OF_HOST:
        model = auto_class(kind).from_pretrained(folder_of(checkpoints, kind, "host"))
        _FIRST_LOSS_OF_HOST[kind] = losses_of(make_trainer(kind, model, out))[0]
    return _FIRST_LOSS_OF_HOST[kind]


def runs() -> list:
    """Every combination; the quick ones are all trainers on both schemes together, and plain SFT on every scheme."""
    return [
        pytest.param(
            kind, scheme, adapter, marks=[] if is_quick else pytest.mark.slow, id=f"{kind}, {scheme}, {adapter}"
        )
        for kind in KINDS
        for scheme in SCHEMES
        for adapter in ADAPTERS
        for is_quick in [
            (scheme == "both" and (adapter != "plain LoraConfig" or kind == "sft"))
            or (kind == "sft" and adapter == "full")
        ]
    ]


@pytest.mark.parametrize(("kind", "scheme", "adapter"), runs())
def test_training_starts_at_the_hosts_loss_and_what_is_saved_reloads(kind, scheme, adapter, checkpoints, tmp_path):
    folder = folder_of(checkpoints, kind, scheme)
    model = auto_class(kind).from_pretrained(folder)
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    peft_config = {
        "full": lambda: None,
        "lora_config": lambda: lora_config(model, r=4),
        # Without targets, which are then those that PEFT has for the model type.
        "plain LoraConfig": lambda: peft.LoraConfig(r=4, task_type=task),
    }[adapter]()
    trainer = make_trainer(kind, model, tmp_path / "out", peft_config)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(first_loss_of_host(kind, checkpoints, tmp_path / "host"), rel=1e-5, abs=1e-6)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)
    changed = {
        name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])
    }
    trained_depth = {name for name in changed if is_depth_key(name)}
    if adapter == "plain LoraConfig":
        # A plain config trains LoRA matrices only, also of MoDA's projections, and the head of a classifier.
        assert changed and all("lora_" in name or "score" in name for name in changed)
    else:
        kinds_of_depth = {"attn_res": {"query"}, "moda": {"gate"}, "both": {"query", "gate"}}[scheme]
        assert kinds_of_depth <= {name.rpartition(".")[2] for name in trained_depth}

    trainer.save_model(str(tmp_path / "saved"))
    if adapter == "full":
        reloaded = auto_class(kind).from_pretrained(tmp_path / "saved")
    else:
        reloaded = peft.PeftModel.from_pretrained(auto_class(kind).from_pretrained(folder), tmp_path / "saved")
    ids = random_ids(1, 9)
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert torch.allclose(reloaded.eval()(input_ids=ids).logits, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_a_trainer_takes_a_folder_by_name(kind, checkpoints, tmp_path):
    """TRL then looks for the class by `architectures`, and DPO makes its reference model the same way."""
    folder = folder_of(checkpoints, kind, "both")
    trainer = make_trainer(kind, str(folder), tmp_path / "out")
    own_class = DepthAttnForSequenceClassification if kind == "reward" else DepthAttnForCausalLM
    assert isinstance(trainer.model, own_class)
    if kind == "dpo":
        assert isinstance(trainer.ref_model, DepthAttnForCausalLM)
    expected = first_loss_of_host(kind, checkpoints, tmp_path / "host")
    assert losses_of(trainer)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward", "grpo", "rloo"])
def test_the_command_trains_a_folder_without_this_package(kind, checkpoints, tmp_path):
    """`trl sft --model_name_or_path FOLDER --trust_remote_code`, with LoRA on PEFT's default targets."""
    from processes import run_python

    reward_file = tmp_path / "rewards.py"
    reward_file.write_text("def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n")
    data = tmp_path / "data"
    data.mkdir()
    rows("grpo" if kind == "rloo" else kind).to_json(data / "train.jsonl")
    arguments = [
        *(kind, "--model_name_or_path", str(folder_of(checkpoints, kind, "both")), "--trust_remote_code"),
        *("--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_peft"),
        *("--report_to", "none", "--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "4"),
    ]
    if kind == "reward":
        arguments += ["--lora_task_type", "SEQ_CLS"]
    if kind in ("grpo", "rloo"):
        arguments += ["--reward_funcs", "rewards.length", "--num_generations", "4", "--max_completion_length", "4"]
    code = "import sys; sys.modules['hf_depthattn'] = None\nfrom trl.cli.main import main\nsys.argv[0] = 'trl'\nmain()"
    result = run_python(
        "-c", code, *arguments, cwd=tmp_path, python_path=str(tmp_path), HF_HOME=str(tmp_path / "home")
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert os.path.isfile(tmp_path / "out" / "adapter_model.safetensors")
