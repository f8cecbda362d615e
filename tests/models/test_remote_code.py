"""A saved folder is self-contained: it loads with `trust_remote_code=True` where this package cannot be imported."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from model_checks import randomise_depth
from processes import run_python
from tiny_hosts import random_ids, tiny_host_config

from hf_depthattn import (
    DepthAttnConfig,
    DepthAttnForCausalLM,
    DepthAttnForQuestionAnswering,
    DepthAttnForSequenceClassification,
    DepthAttnForTokenClassification,
    DepthAttnModel,
)
from hf_depthattn.remote_code import AUTO_MAP

CLASS_OF_AUTO = {
    "AutoModel": DepthAttnModel,
    "AutoModelForCausalLM": DepthAttnForCausalLM,
    "AutoModelForSequenceClassification": DepthAttnForSequenceClassification,
    "AutoModelForTokenClassification": DepthAttnForTokenClassification,
    "AutoModelForQuestionAnswering": DepthAttnForQuestionAnswering,
}

# Runs where `import hf_depthattn` fails: load, compare, save from the remote copy, load that again, compare.
_LOAD_ELSEWHERE = """
import sys
sys.modules["hf_depthattn"] = None
import torch, transformers
transformers.logging.set_verbosity_error()
folder, again, auto_names = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
from safetensors.torch import load_file
reference = load_file(folder + "/reference.st")
ids = reference["ids"]
def outputs(model):
    with torch.no_grad():
        return model(ids)[0]
for name in auto_names:
    auto = getattr(transformers, name)
    model, info = auto.from_pretrained(folder + "/" + name, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert torch.equal(outputs(model.eval()), reference[name]), name
    model.save_pretrained(again + "/" + name)
    model = auto.from_pretrained(again + "/" + name, trust_remote_code=True)
    assert torch.equal(outputs(model.eval()), reference[name]), name
# Any checkpoint through any Auto class.
for name in auto_names:
    model = getattr(transformers, name).from_pretrained(folder + "/AutoModelForCausalLM", trust_remote_code=True)
    assert type(model).__name__.startswith("DepthAttn")
print("ok")
"""


def run_without_package(code: str, *arguments: str, hf_home: str) -> subprocess.CompletedProcess:
    """Run Python where `hf_depthattn` cannot be imported and the module cache is empty."""
    return run_python("-c", code, *arguments, cwd=Path(hf_home), HF_HOME=hf_home)


@pytest.mark.parametrize(
    ("connection", "depth_kv"),
    [
        ("attn_res", "attention+mlp"),
        pytest.param("attn_res", None, marks=pytest.mark.slow),
        pytest.param("residual", "attention+mlp", marks=pytest.mark.slow),
        pytest.param("residual", None, marks=pytest.mark.slow),
    ],
)
def test_every_head_loads_and_saves_again_without_the_package(tmp_path, connection, depth_kv):
    from safetensors.torch import save_file

    ids = random_ids(1, 7)
    reference = {"ids": ids}
    for auto_name, model_class in CLASS_OF_AUTO.items():
        fields = {"connection": connection, "depth_kv": depth_kv, "depth_gate": depth_kv and "head"}
        fields["value_residual"] = depth_kv is not None
        model = model_class(DepthAttnConfig(text_config=tiny_host_config("qwen3"), **fields)).eval()
        randomise_depth(model)
        model.save_pretrained(tmp_path / "saved" / auto_name)
        with torch.no_grad():
            reference[auto_name] = model(ids)[0].contiguous()
    save_file(reference, tmp_path / "saved" / "reference.st")
    home = tmp_path / "home"
    home.mkdir()
    result = run_without_package(
        _LOAD_ELSEWHERE, str(tmp_path / "saved"), str(tmp_path / "again"), ",".join(CLASS_OF_AUTO), hf_home=str(home)
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "ok"


def test_saved_folder_names_every_auto_class_and_imports_flat(tmp_path):
    DepthAttnModel(DepthAttnConfig.attn_res(tiny_host_config("llama"))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()
    files = {path.name for path in tmp_path.glob("*.py")}
    for file in files:
        for module in re.findall(r"^\s*from \.(\S+) import", (tmp_path / file).read_text(), re.MULTILINE):
            assert f"{module}.py" in files, (file, module)
    assert not list(tmp_path.glob("*.tmp"))


def test_no_checkpoint_carries_ops_that_no_model_uses(tmp_path):
    DepthAttnModel(DepthAttnConfig.attn_res(tiny_host_config("llama"))).save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.glob("*.py")}
    assert {"attn_res_ops.py", "kernels_attn_res_ops.py"} <= files, "the op and its kernel have one stem"
    assert {"attn_res_phase1_ops.py", "attn_res_phase2_ops.py"} <= files
    for path in tmp_path.glob("*.py"):
        assert "two_phase" not in path.read_text(), path.name
        assert not re.search("two_phase|experimental|pull", path.name), path.name


def test_kernel_files_are_exported_flat(tmp_path, monkeypatch):
    """A model file that imports a kernel takes the kernel and what that imports along, under flat names."""
    from hf_depthattn import remote_code

    package = tmp_path / "package"
    (package / "kernels").mkdir(parents=True)
    (package / "modeling_depthattn.py").write_text(
        "try:\n    from .kernels.fused import read\nexcept ImportError:\n    read = 0\n"
    )
    (package / "configuration_depthattn.py").write_text("")
    (package / "kernels" / "fused.py").write_text("from .tables import SIZES\nread = SIZES\n")
    (package / "kernels" / "tables.py").write_text("SIZES = 3\n")
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(remote_code, "__file__", str(package / "remote_code.py"))
    remote_code.export_model_code(out)
    assert "from .kernels_fused import read" in (out / "modeling_depthattn.py").read_text()
    assert "from .kernels_tables import SIZES" in (out / "kernels_fused.py").read_text()
    # From the flat copy the export gives the same files again.
    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.setattr(remote_code, "__file__", str(out / "remote_code.py"))
    remote_code.export_model_code(again)
    assert {p.name: p.read_text() for p in out.iterdir()} == {p.name: p.read_text() for p in again.iterdir()}


def test_loading_through_the_installed_package_needs_no_trust(tmp_path):
    from transformers import AutoModelForCausalLM

    model = DepthAttnForCausalLM(DepthAttnConfig.attn_res(tiny_host_config("llama"))).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, DepthAttnForCausalLM)
    ids = random_ids(1, 5)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
