"""What is packaged, how it is found in each layout, and what importing it costs.

Layouts: built wheel, editable install, and the repository root with nothing installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from repository import ROOT
from transformers.utils import import_utils

import hf_depthattn

MAPPED_FOLDERS = ("kernels", "conversion", "eval")
CODE_FOLDERS = ("hf_depthattn", *MAPPED_FOLDERS)
IMPORT_SECONDS = 1.0

# Every sub-package, from the same copy of the package (argv[1] is the folder that must hold it).
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
IMPORT_EVERYTHING = f"""
import importlib, os, pkgutil, sys
home = os.path.realpath(sys.argv[1])
names = {PACKAGES}
# One module each as well: the mapped folders have no file of their own.
for name in list(names):
    folder = importlib.import_module(name)
    names += [f"{{name}}.{{found.name}}" for found in pkgutil.iter_modules(folder.__path__) if not found.ispkg][:1]
for name in names:
    module = importlib.import_module(name)
    for place in [module.__file__] if module.__file__ else module.__path__:
        assert os.path.realpath(place).startswith(home + os.sep), (name, place, home)
from hf_depthattn import DepthAttnForCausalLM, retrofit
"""


def run_python(
    code: str, *arguments: str, cwd: Path, pythonpath: tuple[Path, ...] = (), options: tuple[str, ...] = ()
) -> str:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, pythonpath)), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, *options, "-c", code, *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def pip(*arguments: str, cwd: Path) -> None:
    """Runs pip offline with the build tools of this environment."""
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    result = subprocess.run([*command, *offline], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory) -> Path:
    """The files that a build reads, plus folders that must stay out of it; building in place would leave `build/`."""
    copy = tmp_path_factory.mktemp("source") / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*CODE_FOLDERS, "tests", "benchmarks", "examples"):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(source_copy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(source_copy), "--wheel-dir", str(folder), cwd=folder)
    (file,) = folder.glob("hf_depthattn-*.whl")
    return file


# --- layouts ---


def test_wheel_contains_the_mapped_subpackages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names}
    assert top_level == {"hf_depthattn", f"hf_depthattn-{hf_depthattn.__version__}.dist-info"}
    assert "hf_depthattn/py.typed" in names
    for folder in CODE_FOLDERS:
        packaged = "hf_depthattn" if folder == "hf_depthattn" else f"hf_depthattn/{folder}"
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{packaged}/{file.relative_to(ROOT / folder).as_posix()}" in names
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "\nName: hf-depthattn\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_wheel_contains_the_evaluation_tasks_and_the_page_of_the_report(wheel):
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hf_depthattn/eval/tasks/")}
    tasks = (file for file in (ROOT / "eval" / "tasks").rglob("*") if file.is_file())
    assert packaged == {f"hf_depthattn/{file.relative_to(ROOT).as_posix()}" for file in tasks}
    assert len(packaged) > 20
    page = {f"hf_depthattn/eval/report/{name}" for name in ("page.html", "page.css", "page.js")}
    assert page <= set(zipfile.ZipFile(wheel).namelist())


def test_distributions_are_complete_and_pass_the_checks_of_the_index(wheel, source_copy, tmp_path):
    for name in ("build", "twine"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    build = ["build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(source_copy)]
    archive = tmp_path / f"hf_depthattn-{hf_depthattn.__version__}.tar.gz"
    check = ["twine", "check", "--strict", str(wheel), str(archive)]
    for command in (build, check):
        result = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    with tarfile.open(archive) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    # A wheel that is built from it has the same files.
    for name in zipfile.ZipFile(wheel).namelist():
        if ".dist-info/" not in name:
            assert name in names or name.removeprefix("hf_depthattn/") in names, name


def test_installed_wheel_works_from_a_foreign_folder(wheel, tmp_path):
    site = tmp_path / "site"
    pip("install", str(wheel), "--target", str(site), cwd=tmp_path)
    assert (site / "bin" / "depthattn").is_file()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_python(IMPORT_EVERYTHING, str(site), cwd=elsewhere, pythonpath=(site,))


def test_installed_wheel_makes_its_tasks_in_the_cache(wheel, tmp_path):
    pytest.importorskip("lm_eval")
    site, cache = tmp_path / "site", tmp_path / "cache"
    pip("install", str(wheel), "--target", str(site), cwd=tmp_path)
    files = {file: file.stat().st_mtime_ns for file in site.rglob("*") if file.is_file()}
    environment = dict(os.environ, PYTHONPATH=str(site), XDG_CACHE_HOME=str(cache), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "hf_depthattn.lm_eval", "include-path"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.rstrip("\n"))
    assert folder.parent == cache / "hf_depthattn" / "tasks"
    # The tasks of the wheel and those of every subject of MMLU, twice, and of BIG-Bench Hard.
    num_own = len(list((ROOT / "eval" / "tasks").rglob("*.yaml")))
    assert len(list(folder.rglob("*.yaml"))) == num_own + 2 * 57 + 27
    # The installation itself may be read-only.
    assert {file: file.stat().st_mtime_ns for file in site.rglob("*") if file.is_file()} == files


def test_editable_install_works_from_a_foreign_folder(source_copy, tmp_path):
    site = tmp_path / "site"
    pip("install", "--editable", str(source_copy), "--target", str(site), cwd=tmp_path)
    # An editable install works through .pth files, which Python reads in site folders only. -S leaves out those of
    # this environment, where another editable install may be; its other packages are found by their folder.
    activate = f"""
import site, sys
site.addsitedir({str(site)!r})
sys.path.append({sysconfig.get_path("purelib")!r})
"""
    run_python(activate + IMPORT_EVERYTHING, str(source_copy), cwd=tmp_path, options=("-S",))


# Stands in for the PyPI package: answers to every name, decorators return what they decorate.
FAKE_KERNELS = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})
    return lambda *args, **kwargs: lambda decorated: decorated
"""


def test_repository_root_works_with_the_wheel_and_the_pypi_package_kernels_installed(wheel, tmp_path):
    # transformers imports names from the PyPI package `kernels` if it accepts its version. A folder `kernels` with an
    # `__init__.py` in the working directory would be imported instead, and no model could be imported any more.
    pip("install", str(wheel), "--target", str(tmp_path), cwd=tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    accepted_version = import_utils.KERNELS_MIN_VERSION
    metadata = tmp_path / f"kernels-{accepted_version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {accepted_version}\n")
    (metadata / "RECORD").write_text("kernels/__init__.py,,\n")
    code = """
import kernels
import transformers.integrations.hub_kernels, transformers.modeling_utils
from transformers.utils import is_kernels_available
assert is_kernels_available()
assert kernels.__file__.startswith(sys.argv[2]), kernels.__file__
"""
    # The working directory comes first on the path, so it is the checkout that is imported.
    run_python(IMPORT_EVERYTHING + code, str(ROOT), str(tmp_path), cwd=ROOT, pythonpath=(tmp_path,))


@pytest.mark.parametrize("folder", MAPPED_FOLDERS)
def test_mapped_folder_has_no_init_file(folder):
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_top_level_files_shadow_no_dependency():
    allowed = {*CODE_FOLDERS, "tests", "model_cards", "benchmarks", "examples", "docs"}
    assert not list(ROOT.glob("*.py"))
    with_code = {file.parent.name for file in ROOT.glob("[!.]*/*.py")}
    assert with_code <= allowed


def test_pins_agree():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert f'"ruff=={pins["ruff"]}"' in (ROOT / ".pre-commit-config.yaml").read_text()
    oldest = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    for requirement in requirements:
        name, floor = re.match(r"([\w-]+)(?:\[.*\])?(?:>=([\d.]+))?", requirement).groups()
        if name in ("transformers", "huggingface_hub", "safetensors", "accelerate", "peft", "tensorboard"):
            assert oldest[name].startswith(floor), f"{name}: the oldest tested version is not the oldest one allowed"


def test_the_extra_for_training_brings_what_its_script_reports_to():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(requirement.startswith("tensorboard>=") for requirement in extras["train"])
    assert re.search(r"^tensorboard==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


# --- public API and the cost of importing it ---


def test_public_names_are_few_and_listed():
    assert len(hf_depthattn.__all__) <= 10
    assert len(set(hf_depthattn.__all__)) == len(hf_depthattn.__all__)
    assert set(hf_depthattn.__all__) <= set(dir(hf_depthattn))


@pytest.mark.parametrize("name", hf_depthattn.__all__)
def test_public_name_resolves(name):
    value = getattr(hf_depthattn, name)
    assert value.__name__ == name
    assert value.__doc__


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_depthattn.no_such_name


def test_import_is_cheap_and_loads_no_modelling_code():
    code = """
import sys, time
import transformers.configuration_utils, transformers.models.auto.configuration_auto
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    # There the tables of the Auto classes import all of generation, which takes seconds.
    import transformers.models.auto.modeling_auto
before = "transformers.modeling_utils" in sys.modules
start = time.perf_counter()
import hf_depthattn
seconds = time.perf_counter() - start
print(seconds, before or "transformers.modeling_utils" not in sys.modules)
"""
    seconds = []
    for _ in range(3):
        measured, lazy = run_python(code, cwd=ROOT).split()
        assert lazy == "True", "importing hf_depthattn imported transformers.modeling_utils"
        seconds.append(float(measured))
        if seconds[-1] < IMPORT_SECONDS:
            break
    assert min(seconds) < IMPORT_SECONDS, f"importing hf_depthattn took {seconds} s"


def test_import_uses_no_network():
    code = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args}")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import hf_depthattn
for name in hf_depthattn.__all__:
    getattr(hf_depthattn, name)
"""
    run_python(code, cwd=ROOT)


def test_auto_classes_know_the_model_type():
    from transformers import AutoConfig, pipelines
    from transformers.models.auto import modeling_auto

    config = AutoConfig.for_model("depthattn", text_config={"model_type": "llama", "num_hidden_layers": 2})
    assert type(config) is hf_depthattn.DepthAttnConfig
    for auto_name, class_name in {
        "AutoModel": "DepthAttnModel",
        "AutoModelForCausalLM": "DepthAttnForCausalLM",
        "AutoModelForSequenceClassification": "DepthAttnForSequenceClassification",
        "AutoModelForTokenClassification": "DepthAttnForTokenClassification",
        "AutoModelForQuestionAnswering": "DepthAttnForQuestionAnswering",
    }.items():
        mapping = getattr(modeling_auto, auto_name)._model_mapping
        assert hf_depthattn.DepthAttnConfig in mapping
        assert mapping[hf_depthattn.DepthAttnConfig] is getattr(hf_depthattn, class_name)
    # Pipelines, Trainer and upstream's tests look at the names.
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["depthattn"] == "DepthAttnForCausalLM"
    assert "text-generation" in pipelines.PIPELINE_REGISTRY.get_supported_tasks()


def test_the_names_that_are_registered_are_those_of_the_classes():
    from hf_depthattn.integrations import auto_classes
    from hf_depthattn.remote_code import AUTO_MAP

    ours = {"AutoConfig": auto_classes._CONFIG_CLASS, **auto_classes._MODEL_CLASSES}
    assert ours == {auto_name: reference.rpartition(".")[2] for auto_name, reference in AUTO_MAP.items()}
    assert hf_depthattn.DepthAttnConfig.model_type == auto_classes._MODEL_TYPE


_CONFIG = "text_config={'model_type': 'llama', 'num_hidden_layers': 2}"
# Every order in which the package, its config and the Auto classes can be imported.
REGISTRATION_ORDERS = {
    "package first": f"""
import hf_depthattn, sys
assert not {{"torch", "transformers"}} & set(sys.modules)
from transformers import AutoConfig
config = AutoConfig.for_model("depthattn", {_CONFIG})
assert type(config) is hf_depthattn.DepthAttnConfig
""",
    "config first": f"""
from hf_depthattn.configuration_depthattn import DepthAttnConfig
from transformers import AutoConfig, AutoModel
assert type(AutoConfig.for_model("depthattn", {_CONFIG})) is DepthAttnConfig
assert DepthAttnConfig in AutoModel._model_mapping
""",
    "Auto classes first": f"""
from transformers import AutoConfig, AutoModelForCausalLM
import hf_depthattn
config = AutoConfig.for_model("depthattn", {_CONFIG})
assert AutoModelForCausalLM._model_mapping[type(config)] is hf_depthattn.DepthAttnForCausalLM
""",
    "AutoConfig first": f"""
from transformers import AutoConfig
import hf_depthattn
from transformers import AutoModelForCausalLM
config = AutoConfig.for_model("depthattn", {_CONFIG})
assert AutoModelForCausalLM._model_mapping[type(config)] is hf_depthattn.DepthAttnForCausalLM
""",
}


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=name, marks=[pytest.mark.slow] if name in ("Auto classes first", "config first") else [])
        for name, code in REGISTRATION_ORDERS.items()
    ],
)
def test_the_model_type_is_registered_in_every_order_of_imports(code):
    run_python(code, cwd=ROOT)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["verify", "a", "b", "--nonsense"]], ids=str)
def test_help_and_wrong_options_do_not_wait_for_torch(arguments):
    code = f"""
import sys
from hf_depthattn.cli.main import main
try:
    code = main({arguments!r})
except SystemExit as stop:
    code = stop.code
assert code == (2 if "--nonsense" in {arguments!r} else 0), code
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    run_python(code, cwd=ROOT)


def test_registration_falls_back_to_the_public_api(monkeypatch):
    from transformers.models.auto import modeling_auto

    from hf_depthattn.integrations import auto_classes

    registered = {}

    class OtherAutoClass:
        _model_mapping = object()

        @classmethod
        def register(cls, config_class, model_class, exist_ok=False):
            registered[config_class] = model_class

    monkeypatch.setattr(modeling_auto, "AutoModelForCausalLM", OtherAutoClass)
    auto_classes.register_auto_classes()
    assert registered == {hf_depthattn.DepthAttnConfig: hf_depthattn.DepthAttnForCausalLM}
