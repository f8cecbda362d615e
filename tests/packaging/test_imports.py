"""Imports point down, as the files have them: between packages, between the wings of `eval`, inside the model code."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from repository import ROOT
from source_imports import CODE_FOLDERS, PACKAGE, imports_of, module_of, parse, python_files

FILES = python_files(*CODE_FOLDERS)
MODULES = {module_of(file) for file in FILES}
#: Files that travel with a checkpoint.
MODEL_FILES = [file for file in FILES if file.parent == ROOT / PACKAGE and file.name != "__init__.py"]

#: Packages from the lowest to the highest. A package imports those below it. The empty name stands for the files
#: directly in `hf_depthattn/`.
PACKAGES = (
    "kernels",
    "",
    "errors",
    "utils",
    "integrations",
    "checkpoints",
    "conversion",
    "eval",
    "pretraining",
    "cli",
    "distributed",
    "lm_eval",
    "serve",
)
#: The wings of `eval`, and which others each may import; all may import the files directly in `eval/`.
WINGS = {"metrics": (), "report": ("metrics",), "harness": (), "verify": (), "slot_selection": ("metrics",)}

#: Parts of the model code by names of files, and the parts that each must not reach, directly or through others.
PARTS = {
    "ops": ("*_ops", "op_dispatch"),
    "configuration": ("configuration_*", "depth_options"),
    "connections": ("*_connection", "connection_base", "depth_connections"),
    "layers": ("*_layer",),
    "models": ("modeling_*",),
}
OUT_OF_REACH = {
    "ops": ("configuration", "connections", "layers", "models"),
    "configuration": ("ops", "connections", "layers", "models"),
    "connections": ("layers", "models"),
    "layers": ("models",),
    "models": (),
}


def package_of(module: tuple[str, ...]) -> str:
    return module[0] if len(module) > 1 else ""


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module or ""]
    return []


def relative_imports(file: Path) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(parse(file)) if isinstance(node, ast.ImportFrom) and node.level]


def nodes_inside_try(tree: ast.Module) -> set[ast.AST]:
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Try)]
    return {node for body in bodies for statement in body for node in ast.walk(statement)}


def label(file: Path) -> str:
    return ".".join(module_of(file)) or PACKAGE


@pytest.mark.parametrize("file", [file for file in FILES if module_of(file) != ("__init__",)], ids=label)
def test_imports_point_down(file):
    # `hf_depthattn/__init__.py` names the homes of public names, and imports them on demand.
    module = module_of(file)
    rank = PACKAGES.index(package_of(module))
    for found in imports_of(file, MODULES):
        where = f"{'.'.join(module)}:{found.line} imports {'.'.join(found.target)}"
        if found.target in ((), ("__init__",)):
            continue
        target = package_of(found.target) if found.target in MODULES else found.target[0]
        assert PACKAGES.index(target) <= rank, where
        if module[0] == "eval" and target == "eval" and len(module) > 2:
            wing, other = module[1], found.target[1] if len(found.target) > 2 else ""
            assert other in ("", wing, *WINGS[wing]), where
        if module[0] == "eval" and target == "eval" and len(module) == 2:
            assert len(found.target) == 2, f"{where}: files directly in eval/ know nothing of the wings"


def test_imports_have_no_circle():
    graph = {module_of(file): {found.target for found in imports_of(file, MODULES)} & MODULES for file in FILES}
    graph.pop(("__init__",))
    graphlib.TopologicalSorter(graph).prepare()


def part_of(stem: str) -> str | None:
    return next((part for part, names in PARTS.items() if any(fnmatch(stem, name) for name in names)), None)


def test_every_part_of_the_model_code_has_files():
    assert {part_of(file.stem) for file in MODEL_FILES} - {None} == PARTS.keys()


@pytest.mark.parametrize("file", [file for file in MODEL_FILES if part_of(file.stem)], ids=lambda file: file.stem)
def test_model_code_reaches_nothing_above_it(file):
    direct = {
        module.stem: {found.target[0] for found in imports_of(module, MODULES) if len(found.target) == 1}
        for module in MODEL_FILES
    }
    reached: set[str] = set()
    pending = [file.stem]
    while pending:
        new = direct[pending.pop()] - reached
        reached |= new
        pending += new
    above = {stem for stem in reached if part_of(stem) in OUT_OF_REACH[part_of(file.stem)]}
    assert not above, f"{file.stem} reaches {sorted(above)}"


@pytest.mark.parametrize("folder", ["eval", *(f"eval/{wing}" for wing in WINGS)])
def test_no_folder_of_eval_has_more_files_than_one_can_overlook(folder):
    files = [file for file in (ROOT / folder).glob("*.py") if file.name != "__init__.py"]
    assert len(files) <= 18, f"{folder}: {len(files)} files; give those that belong together a folder"


@pytest.mark.parametrize("file", FILES, ids=label)
def test_packages_import_themselves_relatively(file):
    for node in ast.walk(parse(file)):
        for name in imported_names(node):
            where = f"{file.name}:{node.lineno}"
            assert name.split(".")[0] != PACKAGE or name == PACKAGE, (
                f"{where}: {name}, which type checkers do not find"
            )
            assert name != PACKAGE or file not in MODEL_FILES, f"{where}: a copy on the Hub has no {PACKAGE}"


@pytest.mark.parametrize("file", MODEL_FILES, ids=lambda file: file.name)
def test_model_file_can_be_copied_to_the_hub(file):
    # transformers copies model code flat and follows `from .name import` only; our export rewrites `.kernels.name`.
    inside_try = nodes_inside_try(parse(file))
    for node in relative_imports(file):
        where = f"{file.name}:{node.lineno}"
        assert node.level == 1, f"{where}: parent-relative import"
        assert node.module, f"{where}: `from . import` is not followed"
        *package, _ = node.module.split(".")
        assert package in ([], ["kernels"]), f"{where}: {node.module} is in a sub-package"
        assert package == ["kernels"] or node not in inside_try, f"{where}: relative import inside try"


@pytest.mark.parametrize("file", FILES, ids=label)
def test_import_rules(file):
    tree = parse(file)
    inside_try = nodes_inside_try(tree)
    for node in ast.walk(tree):
        where = f"{file.name}:{getattr(node, 'lineno', 0)}"
        for name in imported_names(node):
            package = name.split(".")[0]
            assert package != "triton" or node in inside_try, f"{where}: import triton outside try"
            assert package not in ("pickle", "dill", "cloudpickle", "joblib"), f"{where}: {package}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            assert ast.unparse(node.func) != "torch.load", f"{where}: torch.load unpickles; use safetensors"
    if re.match(r"(configuration|modeling)_", file.name):
        futures = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        assert not futures, f"{file.name}: string annotations switch the validation of configs off"


@pytest.mark.parametrize("file", python_files("kernels"), ids=lambda file: file.name)
def test_kernels_import_torch_and_triton_only(file):
    for node in ast.walk(parse(file)):
        for name in imported_names(node):
            assert name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}, f"{file.name}: {name}"
    assert all(node.level == 1 for node in relative_imports(file))
