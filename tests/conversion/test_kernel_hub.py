"""The Kernel Hub repository: its layout, and that its package runs without this one."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import tomllib
from pathlib import Path

import pytest
from processes import run_python
from repository import ROOT

from hf_depthattn.conversion import kernel_hub

_SPEC = importlib.util.find_spec("triton")

# Loads a build as the `kernels` library does: from its folder, under a name of its own.
RUN_FROM_FOLDER = """
import importlib.util, sys, torch
def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
kernel = load(sys.argv[1], "loaded_kernel")
torch.manual_seed(0)
sources = [torch.randn(5, 24, requires_grad=True) for _ in range(3)]
query = torch.randn(24, requires_grad=True)
out, _ = kernel.attn_res_read_triton(sources, query, eps=1e-6)
values = torch.stack(sources)
logits = (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * query).sum(-1)
expected = (logits.softmax(0)[..., None] * values).sum(0)
torch.testing.assert_close(out, expected)
upstream = torch.randn_like(out)
leaves = [*sources, query]
for actual, exact in zip(torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)):
    torch.testing.assert_close(actual, exact)
ops = sys.modules["loaded_kernel._ops"]
name = "attn_res_plain_read_triton"
assert hasattr(ops.ops, name) and not hasattr(torch.ops.depthattn, name)
compatible = load(sys.argv[1] + "/depthattn_kernels", "older_kernels_library")
assert set(compatible.__all__) == set(kernel.__all__)
assert not any(name == "hf_depthattn" or name.startswith("hf_depthattn.") for name in sys.modules)
print("ok")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return kernel_hub.write_repository(tmp_path_factory.mktemp("hub") / "out", "someone/depthattn-kernels")


def test_repository_has_the_layout_of_the_hub(repository):
    build = tomllib.loads((repository / "build.toml").read_text())
    general = build["general"]
    assert general["name"] == "depthattn-kernels" and general["backends"] == ["cuda", "rocm"]
    assert general["hub"]["repo-id"] == "someone/depthattn-kernels" and "torch-noarch" in build
    package = repository / "torch-ext" / "depthattn_kernels"
    kernels = {file.name for file in (ROOT / "kernels").glob("*.py")}
    assert {file.name for file in package.iterdir()} == {"__init__.py", *kernels}
    for name in ("LICENSE", "CARD.md", "flake.nix", "tests/test_depthattn_kernels.py"):
        assert (repository / name).is_file()
    card = (repository / "CARD.md").read_text()
    assert "library_name: kernels" in card and "`attn_res_read_triton`:" in card and "{" not in card.split("```")[0]
    assert not any(file.suffix == ".pyc" or ".partial" in file.name for file in repository.rglob("*"))


def test_builds_have_op_names_and_digests_of_their_own(repository):
    identifiers = set()
    for variant in (repository / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        assert variant.name == f"torch-{metadata['backend']['type']}"
        assert metadata["id"].isidentifier() and metadata["id"] in (variant / "_ops.py").read_text()
        identifiers.add(metadata["id"])
        files = {str(file.relative_to(variant)) for file in variant.rglob("*.py")}
        assert files == set(metadata["digest"]["files"])
        for name, digest in metadata["digest"]["files"].items():
            assert base64.b64decode(digest) == hashlib.sha256((variant / name).read_bytes()).digest()
        for file in variant.glob("*.py"):
            assert "depthattn::" not in file.read_text() and "ops.depthattn" not in file.read_text()
    assert len(identifiers) == 2


@pytest.mark.skipif(_SPEC is None, reason="Triton is not installed")
def test_build_runs_in_the_interpreter_without_this_package(repository, tmp_path):
    folder = str(repository / "build" / "torch-cuda")
    paths = str(Path(_SPEC.origin).parent.parent)
    result = run_python(
        "-c",
        RUN_FROM_FOLDER,
        folder,
        cwd=tmp_path,
        python_path=paths,
        TRITON_INTERPRET="1",
        TRITON_CACHE_DIR=str(tmp_path),
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "ok"


@pytest.mark.slow
@pytest.mark.skipif(_SPEC is None, reason="Triton is not installed")
def test_tests_of_the_repository_pass_in_the_interpreter(repository, tmp_path):
    package = tmp_path / "depthattn_kernels"
    package.symlink_to(repository / "build" / "torch-cuda", target_is_directory=True)
    result = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning"),
        str(repository / "tests"),
        cwd=tmp_path,
        python_path=os.pathsep.join((str(tmp_path), str(Path(_SPEC.origin).parent.parent))),
        TRITON_INTERPRET="1",
        TRITON_CACHE_DIR=str(tmp_path),
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "2 passed" in result.stdout


def test_command_refuses_an_existing_folder_and_writes_nothing(repository, tmp_path, capsys):
    before = sorted(repository.rglob("*"))
    assert kernel_hub.main([str(repository)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert sorted(repository.rglob("*")) == before
    assert kernel_hub.main([str(tmp_path / "new"), "--repo-id", "no slash"]) == 2
    assert "--repo-id no slash: must be OWNER/NAME" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_form_of_an_op_name_is_refused(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "x_ops.py").write_text("import torch\nNAME = 'depthattn::x'\n")
    monkeypatch.setattr(kernel_hub, "_kernel_folder", lambda: tmp_path / "kernels")
    with pytest.raises(kernel_hub.UserError, match=r"x_ops\.py: uses the namespace 'depthattn'"):
        kernel_hub.write_repository(tmp_path / "out")
    assert not (tmp_path / "out").exists()
