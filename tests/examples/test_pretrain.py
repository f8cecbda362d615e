"""The example of pretraining: from text to a folder that loads anywhere, resumed runs, two processes, bad input."""

import json
import os
import re
import socket
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from processes import run_python
from repository import ROOT
from safetensors.torch import load_file

from benchmarks.pretraining.results import read_results

EXAMPLE = ROOT / "examples" / "pretrain.py"
HOST = {
    "model_type": "llama",
    **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True},
}
STEPS = 6
OPTIONS = (f"--steps={STEPS}", "--block-size=32", "--batch-size=4", "--tokenizer=bytes")
EVERY = ("--log-every=2", "--eval-every=3", "--save-every=3", "--diagnostics-every=3")
RARELY = ("--log-every=1", "--eval-every=99", "--save-every=99", "--diagnostics-every=0")


@pytest.fixture
def pretrain(tmp_path, monkeypatch):
    """Run the example in this process, in a folder with a text and a host; returns the exit code."""
    pytest.importorskip("accelerate")
    # So that the script may be run several times: a script's folder is on the path, and its run sets the variable.
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    script = EXAMPLE.read_text(encoding="utf-8")
    assert len(script.splitlines()) < 200
    names: dict = {"__name__": "pretrain", "__doc__": "", "__file__": str(EXAMPLE)}
    exec(compile(script, str(EXAMPLE), "exec"), names)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
        return names["run_command"](names["main"], "pretrain.py")

    run.names = names
    return run


def write_inputs(folder: Path) -> None:
    (folder / "host.json").write_text(json.dumps(HOST))
    (folder / "norms.json").write_text(json.dumps({**HOST, "model_type": "olmo2"}))
    (folder / "text").mkdir()
    (folder / "text" / "a.md").write_text((ROOT / "docs" / "concepts.md").read_text(encoding="utf-8"))
    (folder / "text" / "b.py").write_text(EXAMPLE.read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_model_loads_and_writes_without_the_package(pretrain, tmp_path, capsys):
    """BPE, Muon, WSD, MoDA, options of every kind; the folder has all that another machine needs."""
    arguments = ["--host=host.json", "--text", "text", "--endings", ".py", "--out=out", *EVERY, *OPTIONS[:3]]
    arguments += ["--vocab-size=300", "--optimizer=muon", "--schedule=wsd", "--depth-kv=attention", "--num-blocks=2"]
    arguments += ["--set", "num_hidden_layers=2", "--set", "key_norm=false", "--trainer", "max_grad_norm=0.5"]
    assert pretrain(*arguments) == 0
    printed = capsys.readouterr().out
    assert "vocabulary 300" in printed and f"step {STEPS} of {STEPS}: held-out loss " in printed
    losses = [
        float(line.split("held-out loss ")[1].split()[0]) for line in printed.splitlines() if "held-out l" in line
    ]
    assert losses[-1] < losses[0]

    log = json.loads((tmp_path / "out" / "log.json").read_text())
    measured = [entry for entry in log if "depth/slot_mass/layer_1" in entry]
    assert [entry["step"] for entry in measured] == [0, 3, 6]
    assert {"depth/output_magnitude/layer_0", "depth/gradient_norm/layer_1"} <= measured[0].keys()
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "# out\n" in card and "| text | text |" in card and f"| held-out loss | {losses[-1]:.4f} nats" in card
    assert str(tmp_path) not in card

    code = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=True)
assert not any(name.startswith("hf_depthattn") for name in sys.modules)
assert model.config.num_hidden_layers == 2 and model.config.key_norm is False and model.config.sublayers_per_block == 2
assert model.generate(**tokenizer("import", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3).shape[1] > 3
"""
    os.rename(tmp_path / "out" / "model", tmp_path / "model")
    loaded = run_python("-c", code, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert loaded.returncode == 0, loaded.stderr[-2000:]


def test_tensorboard_shows_the_curves_that_the_tutorial_names(pretrain, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ("--host=host.json", "--text", "text/a.md", "--out=out", *OPTIONS, *EVERY, "--depth-kv=attention")
    assert pretrain(*arguments) == 0
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    expected: dict = {}
    for entry in log:
        for key, value in entry.items():
            name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            expected.setdefault(name, []).append((entry["step"], value))
    curves = [name for name in expected if name.startswith("train/depth/")]
    for name in (*curves, "train/loss", "eval/loss"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in expected[name]], name
    # In the table of the tutorial, A and B are numbers of layers and * is the kind of a sublayer.
    page = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
    named = [re.escape(name).replace(r"\*", r"\w+") for name in re.findall(r"`(train/depth/\w+/[^`]+)`", page)]
    patterns = [re.compile(name.replace(r"layers_A\-B", r"layers?_\d+(-\d+)?")) for name in named]
    assert len(patterns) >= 6 and all(any(map(pattern.fullmatch, curves)) for pattern in patterns)
    assert all(any(pattern.fullmatch(name) for pattern in patterns) for name in curves)


def test_killed_run_leaves_no_model_and_is_resumed_exactly(pretrain, tmp_path, capsys, monkeypatch):
    arguments = ("--host=host.json", "--text", "text/a.md", *OPTIONS, *EVERY)
    assert pretrain(*arguments, "--out=whole") == 0
    from hf_depthattn.pretraining.pretraining_run import PretrainingRun

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingRun, "finish", interrupted)
        assert pretrain(*arguments, "--out=killed") == 130
    assert not (tmp_path / "killed" / "model").exists()
    # As if it had been killed while the last checkpoint was written.
    (tmp_path / "killed" / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").write_text('{"epoch": 1')
    capsys.readouterr()
    assert pretrain(*arguments, "--out=killed") == 2
    assert "killed: exists and is not empty; choose another folder, or resume its run." in capsys.readouterr().err
    assert pretrain(*arguments, "--seed=1", "--out=killed", "--resume") == 2
    assert "error: seed: was 0 when the run in killed was started, and is 1 now." in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("transformers.TrainingArguments.world_size", 2)
        assert pretrain(*arguments, "--out=killed", "--resume") == 2
    assert "error: world_size: was 1 when the run in killed was started, and is 2 now." in capsys.readouterr().err
    # The log cannot be written: the run is not finished.
    (tmp_path / "killed" / "log.json").mkdir()
    assert pretrain(*arguments, "--out=killed", "--resume") == 2
    assert not (tmp_path / "killed" / "model").exists()
    (tmp_path / "killed" / "log.json").rmdir()
    (tmp_path / "killed" / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").write_text('{"epoch": 1')
    capsys.readouterr()
    assert pretrain(*arguments, "--out=killed", "--resume") == 0
    assert "step 4 of" in capsys.readouterr().out
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture
def starts(pretrain, monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The initial weights of every run of the test."""
    seen: list = []
    trainer_class = pretrain.names["Trainer"]

    def make(model, *arguments, **more):
        seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return trainer_class(model, *arguments, **more)

    monkeypatch.setitem(pretrain.names, "Trainer", make)
    return seen


def test_scaled_outputs_are_a_flag_and_in_the_card(pretrain, starts, tmp_path):
    arguments = ("--host=host.json", "--text", "text/a.md", "--steps=1", *OPTIONS[1:], *RARELY)
    assert pretrain(*arguments, "--out=plain") == pretrain(*arguments, "--out=scaled", "--scale-outputs") == 0
    plain, scaled = starts
    for name, weight in plain.items():
        is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.equal(scaled[name], weight * 6**-0.5 if is_output else weight), name
    cards = [(tmp_path / name / "model" / "README.md").read_text() for name in ("plain", "scaled")]
    assert ["| initial weights | outputs of sublayers scaled as in GPT-2 |" in card for card in cards] == [False, True]


# Connections that start as the host; MoDA's projections are drawn at random.
AS_HOST = {
    "block": ("--connection=attn_res", "--set", "read_scale=sum"),
    "gated": ("--connection=residual", "--depth-kv=attention+mlp", "--depth-gate=head"),
}
# LayerDrop draws random numbers during training.
COMPARED = {"baseline": ("--connection=residual",), **AS_HOST, "dropped": ("--connection=layer_drop",)}


def test_runs_of_a_seed_have_the_same_batches_and_initial_weights_whatever_the_connection(
    pretrain, starts, tmp_path, monkeypatch
):
    texts: list = []

    class RecordedText(pretrain.names["PackedText"]):
        def __init__(self, blocks):
            super().__init__(blocks)
            self.order = []
            texts.append(self)

        def __getitem__(self, index):
            self.order.append(index)
            return super().__getitem__(index)

    monkeypatch.setitem(pretrain.names, "PackedText", RecordedText)
    (tmp_path / "short.txt").write_text("".join(map(chr, range(33, 127))) * 6)
    # Two passes over the text.
    arguments = ("--host=host.json", "--text", "short.txt", *OPTIONS[1:], "--epochs=2", *RARELY)
    for name, options in COMPARED.items():
        assert pretrain(*arguments, *options, f"--out={name}") == 0
    assert pretrain(*arguments, *COMPARED["baseline"], "--seed=1", "--out=other") == 0
    orders = [text.order for text in texts[::2]]
    *of_seed, of_other = orders
    assert len(of_seed[0]) == 2 * len(texts[0]) and of_seed[0] != of_other
    assert all(order == of_seed[0] for order in of_seed)
    baseline, *others, other = starts
    for name, weight in baseline.items():
        assert all(torch.equal(weight, start[name]) for start in others), name
    assert any(not torch.equal(weight, other[name]) for name, weight in baseline.items())

    def first_loss(name: str) -> float:
        log = json.loads((tmp_path / name / "log.json").read_text())
        return next(entry["loss"] for entry in log if "loss" in entry)

    assert all(first_loss(name) == pytest.approx(first_loss("baseline"), rel=1e-6) for name in AS_HOST)
    assert first_loss("dropped") != pytest.approx(first_loss("baseline"), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "train", "held_out"),
    [
        (["--text", "stdlib"], [0], [1]),
        (["--text", "text/a.md"], ["a"], []),
        (["--text", "stdlib", "text/a.md", "--eval-text", "text/a.md"], [0, "a"], ["a"]),
        (["--text", "stdlib", "--eval-text", "text/a.md", "stdlib"], [0], ["a", 1]),
        (["--text", "text/a.md", "--eval-text", "stdlib"], ["a"], [1]),
    ],
)
def test_held_out_files_of_stdlib_are_measured_and_never_trained_on(
    pretrain, tmp_path, monkeypatch, arguments, train, held_out
):
    parts = (["train one", "train two"], ["held out"])
    texts = {0: parts[0], 1: parts[1], "a": [(tmp_path / "text" / "a.md").read_text()]}
    names = pretrain.names
    monkeypatch.setitem(names, "stdlib_files", lambda: parts)
    monkeypatch.setitem(names, "split", lambda files: files)
    monkeypatch.setitem(names, "read_texts", iter)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--host=host.json", "--out=out", *arguments])
    found = names["read_documents"](names["parse_arguments"]())
    assert found == tuple([text for key in keys for text in texts[key]] for keys in (train, held_out))


def test_the_default_rate_is_the_best_one_of_the_study_over_all_arms(pretrain, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--host=host.json", "--text=text", "--out=out"])
    default = pretrain.names["parse_arguments"]().learning_rate
    losses: dict = {}
    for run, result in read_results().items():
        if (run.corpus, run.tokens, run.num_layers, run.seed, run.start) == ("stdlib", 100_000, 16, 0, None):
            losses.setdefault(run.learning_rate, {})[run.arm] = result.loss
    of_all = {rate: mean(arms.values()) for rate, arms in losses.items() if arms.keys() == losses[default].keys()}
    assert len(of_all) >= 3 and min(of_all, key=of_all.get) == default


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(pretrain, tmp_path):
    """`accelerate launch` on two CPU processes with half the batch each."""
    arguments = ["--host=host.json", "--text", "text/a.md", *OPTIONS, *EVERY, "--connection=residual"]
    arguments += ["--depth-kv=attention+mlp", "--trainer", "use_cpu=true", "--trainer", "bf16=false"]
    assert pretrain(*arguments, "--out=one") == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # With `--cpu`, accelerate starts several processes through MPI only.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", f"--main_process_port={port}"]
    launched = [*launch, str(EXAMPLE), *arguments, "--batch-size=2", "--out=two"]
    result = run_python(*launched, cwd=tmp_path, python_path=str(ROOT))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 process(es)" in result.stdout
    assert result.stdout.count("held-out loss") == 3, "only the first process prints"
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, expected in one.items():
        assert (two[name] - expected).norm() <= 1e-4 * expected.norm(), name


BAD = {
    "missing text": (["--text", "missing.txt"], "missing.txt: No such file or directory"),
    "empty text": (["--text", "empty.txt"], "--text empty.txt: contains no text."),
    "short text": (["--text", "short.txt"], "--text: 6 tokens are fewer than one block of 32; give more text."),
    "one block": (["--text", "block.txt"], "--text: is a single block of 32 tokens, but one is held out"),
    "bad data set": (["--text", "hf:name"], "--text hf:name: must be hf:ID[@CONFIG]:SPLIT[:COLUMN]."),
    "missing host": (["--host=none/none"], "none/none: is no file, folder, model type or model on the Hub."),
    "unknown option": (["--layers=3"], "unrecognized arguments: --layers=3 (see pretrain.py --help)"),
    "option without a flag": (
        ["--norm-position", "post", "--num-streams=2"],
        "arguments: --norm-position post --num-streams=2; use --set norm_position=post --set num_streams=2 (see",
    ),
    "field without a flag": (["--num-hidden-layers", "2"], "; use --set num_hidden_layers=2 (see pretrain.py --help)"),
    "options that need another": (["--connection=deepnorm"], "with --connection deepnorm, whose norms come after"),
    "unknown field": (["--set", "layers=3"], "--set layers: must be an option of depth attention (connection, "),
    "no value": (["--set", "num_hidden_layers"], "--set num_hidden_layers: must be FIELD=VALUE."),
    "bad value": (["--connection=none"], "connection: 'none' is not one of 'residual', 'attn_res'"),
    "long blocks": (["--block-size=65"], "max_position_embeddings: 64 must be at least 65"),
    "no steps": (["--steps=0"], "--steps 0: must be at least 1."),
    "no epochs": (["--epochs=0"], "--epochs 0: must be more than 0."),
    "overlapping schedule": (
        ["--schedule=wsd", "--warmup=0.5", "--decay=0.8"],
        "--warmup: 3 steps of warm-up and 4 of",
    ),
    "bad argument of Trainer": (["--trainer", "speed=3"], "--trainer speed: must be a field of transformers.Train"),
    "bad strategy": (["--trainer", "save_strategy=never"], "TrainingArguments: "),
    "norms of outputs": (
        ["--host=norms.json", "--scale-outputs"],
        "model: its host normalises outputs of sublayers (post_attention_layernorm), so that smaller projections",
    ),
    "nothing to resume": (["--resume"], "out: contains no run to resume."),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(pretrain, tmp_path, capsys, arguments, message):
    for name, text in {"empty.txt": " \n", "short.txt": "short", "block.txt": "x" * 40}.items():
        (tmp_path / name).write_text(text)
    assert pretrain("--host=host.json", "--text", "text", "--out=out", *OPTIONS, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pretrain.py: error: ") and message in error
    assert not (tmp_path / "out").exists()
