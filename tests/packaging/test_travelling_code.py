"""Files directly in `hf_depthattn/` travel with a checkpoint, and a checkpoint carries nothing that it cannot use.

What is checked: functions, classes, methods and constants (names in capitals) of the exported files are used, by name,
somewhere in these files outside their own definition.

What is not: names are not resolved, so that any attribute or variable of the same name counts as a use, and two unused
functions that call each other are not found. What a decorator takes (kernels, properties, registered functions),
double-underscore methods, what overrides a name of a base class outside these files (hooks that transformers or torch
call), and what `__all__` names are not asked for. Parameters that nobody passes and branches that nobody takes are not
found either.
"""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from pathlib import Path

import pytest
from repository import ROOT

import hf_depthattn
from hf_depthattn.remote_code import export_model_code

#: Reached by name: transformers and engines look these classes up.
PUBLIC = {*hf_depthattn.__all__, "DepthAttnModelWithOwnAttention"}
#: Beginnings of methods that others find by name: the validation of configs, and Python's import.
BY_PROTOCOL = ("validate_", "find_spec")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> list[Path]:
    return export_model_code(tmp_path_factory.mktemp("checkpoint"))


def names_in(tree: ast.AST) -> Counter[str]:
    """How often each name is used; where it is defined or assigned does not count."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found[node.id] += isinstance(node.ctx, ast.Load)
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.ImportFrom):
            # An import alone is no use: a name that is imported and not used is found by ruff.
            continue
    return found


def definitions(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def constants(tree: ast.Module) -> list[str]:
    """Names in capitals that a module assigns, with or without an underscore in front."""
    targets: list[ast.expr] = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AnnAssign):
            targets.append(node.target)
    names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [name for name in names if name.lstrip("_")[:1].isupper()]


def inherited_names(module: str) -> dict[str, set[str]]:
    """Class of a module -> the names that its base classes outside our package define: others call their overrides."""
    loaded = importlib.import_module(module)
    return {
        name: {inherited for base in kind.__mro__[1:] if not is_ours(base) for inherited in vars(base)}
        for name, kind in vars(loaded).items()
        if isinstance(kind, type) and kind.__module__ == module
    }


def is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == hf_depthattn.__name__


def module_of(file: Path) -> str:
    stem = file.stem
    name = f"kernels.{stem.removeprefix('kernels_')}" if stem.startswith("kernels_") else stem
    return f"{hf_depthattn.__name__}.{name}"


def test_every_flat_file_travels(exported):
    flat = {file.name for file in (ROOT / "hf_depthattn").glob("*.py")} - {"__init__.py"}
    travelling = {file.name for file in exported if not file.name.startswith("kernels_")}
    assert travelling == flat


def test_every_function_that_travels_is_used_by_what_travels(exported):
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in exported}
    used = sum((names_in(tree) for tree in trees.values()), Counter())
    unused = [
        f"{file.name}: {node.name}"
        for file, tree in trees.items()
        for node in definitions(tree)
        # Decorators such as `register` use what they decorate.
        if node.name not in PUBLIC and not used[node.name] - names_in(node)[node.name] and not node.decorator_list
    ]
    assert not unused


def test_every_method_that_travels_is_used_by_what_travels(exported):
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in exported}
    used = sum((names_in(tree) for tree in trees.values()), Counter())
    unused = []
    for file, tree in trees.items():
        inherited = inherited_names(module_of(file))
        unused += [
            f"{file.name}: {kind.name}.{method.name}"
            for kind in definitions(tree)
            if isinstance(kind, ast.ClassDef)
            for method in kind.body
            if isinstance(method, ast.FunctionDef) and not method.name.startswith(("__", *BY_PROTOCOL))
            if method.name not in inherited.get(kind.name, set()) and not method.decorator_list
            if not used[method.name] - names_in(method)[method.name]
        ]
    assert not unused


def test_every_constant_that_travels_is_used_by_what_travels(exported):
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in exported}
    used = sum((names_in(tree) for tree in trees.values()), Counter())
    assert not [f"{file.name}: {name}" for file, tree in trees.items() for name in constants(tree) if not used[name]]


def test_the_checks_see_what_is_unused():
    tree = ast.parse("_LIMIT = 3\nUSED: int = 4\nsmall = USED\nclass A:\n    def b(self): return self.b()\n")
    assert constants(tree) == ["_LIMIT", "USED"] and not names_in(tree)["_LIMIT"] and names_in(tree)["USED"]
    (kind,) = definitions(tree)
    assert names_in(tree)["b"] == names_in(kind.body[0])["b"] == 1
