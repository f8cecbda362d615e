"""The example of pipeline training on two gloo processes: a new model, a resumed run, a checkpoint, bad input."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import needs_stage_interface  # noqa: F401
import pytest
import torch
from processes import run_python
from repository import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_depthattn.checkpoints.checkpoint_files import read_weight_files

EXAMPLE = ROOT / "examples" / "train_pipeline.py"
HOST = {
    "model_type": "llama",
    **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True},
}
SIZES = ["--block-size=32", "--microbatches=2"]
MODA = ["--sublayers-per-block=3", "--depth-kv=attention+mlp"]
NEW = ["host.json", "book.txt", *SIZES, *MODA]
#: Runs, in this order: name -> arguments.
RUNS = {
    "whole": [*NEW, "--out=whole", "--steps=3"],
    "begun": [*NEW, "--out=run", "--steps=1", "--save-every=1"],
    "again": [*NEW, "--out=run", "--steps=2"],
    "resumed": [*NEW, "--out=run", "--steps=3", "--resume", "--schedule=1F1B"],
    "tuned": ["run/model", "book.txt", "--out=tuned", "--steps=1", "--schedule=ZBVZeroBubble", *SIZES],
    "changed": ["run/model", "book.txt", "--out=new", "--num-blocks=2", *SIZES],
    "split": [*NEW, "--out=new", "--stages-per-rank=3"],
}
#: The processes are forked after the imports, of which some are in functions; they take longer than the runs.
CODE = """
import os, sys
from pathlib import Path
import torch.multiprocessing as mp
import transformers.trainer
from transformers.models.llama import modeling_llama

names = {"__name__": "train_pipeline", "__doc__": ""}
exec(compile(Path(sys.argv[1]).read_text(), sys.argv[1], "exec"), names)

def run(rank, arguments, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sys.argv = ["train_pipeline.py", *arguments]
    os.dup2(os.open(f"out{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(f"err{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    code = names["run_command"](names["main"], "train_pipeline.py")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin.read().splitlines():
    port, *arguments = line.split()
    context = mp.start_processes(run, args=(arguments, port), nprocs=2, join=False, start_method="fork")
    for process in context.processes:
        process.join()
    result = {"codes": [process.exitcode for process in context.processes]}
    result |= {name: Path(name).read_text() for name in ("out0", "out1", "err0", "err1")}
    print(result, flush=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_inputs(folder)
    return folder


def write_inputs(folder: Path) -> None:
    (folder / "host.json").write_text(json.dumps(HOST))
    (folder / "book.txt").write_text("A rank keeps what it has seen, and sends what the next one has not. " * 60)


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict]:
    """The result of every run."""
    lines = "\n".join(f"{free_port()} {' '.join(arguments)}" for arguments in RUNS.values())
    process = subprocess.run(
        [sys.executable, "-c", CODE, str(EXAMPLE)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        input=lines,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return dict(zip(RUNS, map(eval, process.stdout.splitlines()), strict=True))


def losses(result: dict) -> dict[int, float]:
    """Step -> loss, as the process of the last stage prints it."""
    lines = [line for line in (result["out0"] + result["out1"]).splitlines() if line.startswith("step ")]
    return {int(line.split()[1].rstrip(":")): float(line.split()[-1]) for line in lines}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    shards = read_weight_files(folder).shards
    return {name: tensor for shard in shards for name, tensor in load_file(shard.path).items()}


def test_example_is_short():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 150


def test_a_new_model_is_trained_and_saved(folder, results):
    assert results["whole"]["codes"] == [0, 0], results["whole"]["err0"]
    found = losses(results["whole"])
    assert list(found) == [1, 2, 3]
    assert found[3] < found[1]
    model = AutoModelForCausalLM.from_pretrained(folder / "whole" / "model")
    assert model.config.depth_kv == "attention+mlp"
    tokenizer = AutoTokenizer.from_pretrained(folder / "whole" / "model")
    assert model(tokenizer("A rank", return_tensors="pt")["input_ids"]).logits.isfinite().all()


def test_a_resumed_run_with_another_schedule_ends_as_an_uninterrupted_one(folder, results):
    assert results["begun"]["codes"] == results["resumed"]["codes"] == [0, 0], results["resumed"]["err0"]
    assert list(losses(results["resumed"])) == [2, 3]
    expected = tensors(folder / "whole" / "model")
    found = tensors(folder / "run" / "model")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_trained_on(folder, results):
    assert results["tuned"]["codes"] == [0, 0], results["tuned"]["err0"]
    assert losses(results["tuned"])[1] < losses(results["whole"])[1]
    assert tensors(folder / "tuned" / "model").keys() == tensors(folder / "run" / "model").keys()


@pytest.mark.parametrize(
    "name, message",
    [
        ("again", "--out run: is not empty; continue its run with --resume"),
        ("changed", "num_blocks: cannot be changed in a checkpoint"),
        ("split", "num_stages: 6 must be between 1 and 4, the number of decoder layers"),
    ],
)
def test_bad_input_is_one_line(results, name, message):
    codes = results[name]["codes"]
    assert 0 not in codes
    # One process may end while the other still connects to it, which then has another error.
    lines = [results[name][f"err{rank}"].splitlines()[-1] for rank in (0, 1) if codes[rank] == 2]
    assert lines and all(message in line for line in lines)


@pytest.mark.slow
def test_torchrun_runs_it(tmp_path):
    write_inputs(tmp_path)
    command = ["-m", "torch.distributed.run", f"--master-port={free_port()}", "--nproc-per-node=4", str(EXAMPLE)]
    result = run_python(*command, *NEW, "--out=new", "--fsdp=3", cwd=tmp_path, python_path=str(ROOT))
    assert "--fsdp 3: must divide the number of processes, 4" in result.stderr
    result = run_python(*command, *NEW, "--out=out", "--steps=2", "--fsdp=2", cwd=tmp_path, python_path=str(ROOT))
    assert result.returncode == 0, result.stderr[-3000:]
    assert list(losses({"out0": result.stdout, "out1": ""})) == [1, 2]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
