"""Files directly in `hf_depthattn/` travel with a checkpoint, and a checkpoint carries nothing that it cannot use."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from repository import ROOT

import hf_depthattn
from hf_depthattn.remote_code import export_model_code

#: Reached by name: transformers looks these classes up.
PUBLIC = set(hf_depthattn.__all__)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> list[Path]:
    return export_model_code(tmp_path_factory.mktemp("checkpoint"))


def names_in(tree: ast.AST) -> Counter[str]:
    """How often each name is used; where it is defined does not count."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.ImportFrom):
            # An import alone is no use: a name that is imported and not used is found by ruff.
            continue
    return found


def definitions(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


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
