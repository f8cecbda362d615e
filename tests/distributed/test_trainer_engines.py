"""Trainer on two CPU processes, started as users start it: what one process trains, saved and resumed."""

from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from packaging.version import Version
from peft import PeftModel
from process_groups import free_port
from processes import run_python
from repository import ROOT
from safetensors.torch import load_file
from trainer_runs import NUM_STEPS, RUNS, Run, model_of, parameters, trained

from hf_depthattn import DepthAttnForCausalLM

pytestmark = pytest.mark.slow

HAS_CONTEXT_PARALLEL = Version(accelerate.__version__) >= Version("1.12")
#: launcher -> its arguments, for two processes
LAUNCHERS = {
    # With `--cpu`, accelerate starts several processes through MPI only.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port={port}"],
    # As docs/distributed.md has it.
    "accelerate-fsdp": [
        *("accelerate.commands.launch", "--use_fsdp", "--fsdp_version=2", "--num_processes=2"),
        *("--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP", "--fsdp_state_dict_type=FULL_STATE_DICT"),
        *("--fsdp_transformer_layer_cls_to_wrap=DepthAttnDecoderLayer", "--main_process_port={port}"),
    ],
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--master-port={port}"],
}


def launched(launcher: str, folder: Path, names: list[str]) -> Path:
    command = [argument.format(port=free_port()) for argument in LAUNCHERS[launcher]]
    script = [str(ROOT / "tests/support/trainer_runs.py"), str(folder), *names]
    python_path = f"{ROOT}:{ROOT / 'tests/support'}"
    # With another HF_HOME, a config of `accelerate launch` on this machine is not used.
    result = run_python("-m", *command, *script, cwd=folder, python_path=python_path, HF_HOME=str(folder))
    assert result.returncode == 0, result.stderr[-5000:]
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("trained")] == names
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Path:
    return launched("accelerate", tmp_path_factory.mktemp("ddp"), ["ddp", "ddp-lora"])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    names = ["fsdp2-full", "fsdp2-sharded", "fsdp2-lora"]
    return launched("torchrun", tmp_path_factory.mktemp("sharded"), names + ["cp"] * HAS_CONTEXT_PARALLEL)


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> Path:
    pytest.importorskip("deepspeed")
    return launched("torchrun", tmp_path_factory.mktemp("zero"), ["zero2", "zero3"])


@pytest.mark.parametrize(
    ("launcher", "name"), [("torchrun", "ddp"), ("accelerate-fsdp", "fsdp2-launcher")], ids=["ddp", "fsdp2"]
)
def test_the_other_launcher_trains_what_one_process_does(launcher, name, tmp_path):
    (tmp_path / "run").mkdir()
    folder = launched(launcher, tmp_path / "run", [name])
    saved = check_like_one_process(folder, name, tmp_path)
    check_saved(saved, DepthAttnForCausalLM.from_pretrained(folder / name / f"checkpoint-{NUM_STEPS}"))


def check_like_one_process(folder: Path, name: str, tmp_path: Path) -> dict[str, torch.Tensor]:
    expected = parameters(trained(RUNS[name]._replace(engine="ddp"), tmp_path / "one", num_processes=1).model)
    found = torch.load(folder / f"{name}.pt", weights_only=True)
    start = parameters(model_of(RUNS[name]))
    assert found.keys() == expected.keys()
    for key, parameter in expected.items():
        torch.testing.assert_close(found[key], parameter, rtol=1e-4, atol=2e-6, msg=key)
    assert sum(not torch.equal(found[key], parameter) for key, parameter in start.items()) > 20
    return found


def check_saved(saved: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    for key, parameter in parameters(model).items():
        assert torch.equal(parameter, saved[key]), key


@pytest.mark.parametrize(
    ("name", "engine"), [("ddp", "ddp"), ("fsdp2-full", "sharded"), ("zero2", "zero"), ("zero3", "zero")]
)
def test_checkpoints_load_as_models(request, name, engine, tmp_path):
    folder = request.getfixturevalue(engine)
    saved = check_like_one_process(folder, name, tmp_path)
    check_saved(saved, DepthAttnForCausalLM.from_pretrained(folder / name / f"checkpoint-{NUM_STEPS}"))


def test_sharded_checkpoints_are_merged_by_accelerate(sharded, tmp_path):
    saved = check_like_one_process(sharded, "fsdp2-sharded", tmp_path)
    shards = sharded / "fsdp2-sharded" / f"checkpoint-{NUM_STEPS}" / "pytorch_model_fsdp_0"
    merge_fsdp_weights(str(shards), str(tmp_path / "merged"))
    model = model_of(Run("ddp"))
    assert not model.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors")).missing_keys
    check_saved(saved, model)


@pytest.mark.parametrize("name", ["ddp-lora", "fsdp2-lora"])
def test_adapters_with_depth_parameters_load(request, name, tmp_path):
    folder = request.getfixturevalue("ddp" if name == "ddp-lora" else "sharded")
    saved = check_like_one_process(folder, name, tmp_path)
    adapter = folder / name / f"checkpoint-{NUM_STEPS}"
    check_saved(saved, PeftModel.from_pretrained(model_of(Run("ddp")), adapter))


@pytest.mark.skipif(not HAS_CONTEXT_PARALLEL, reason="Trainer needs accelerate 1.12 for context parallelism")
def test_context_parallelism_trains_what_one_process_does(sharded, tmp_path):
    check_like_one_process(sharded, "cp", tmp_path)
