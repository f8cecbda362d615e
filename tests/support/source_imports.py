"""Parse the imports in the source files of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from repository import ROOT

PACKAGE = "hf_depthattn"
#: Sub-packages whose folders are outside `hf_depthattn/` in the repository (pyproject.toml).
MAPPED_FOLDERS = ("kernels", "conversion", "eval")
CODE_FOLDERS = (PACKAGE, *MAPPED_FOLDERS)


class Import(NamedTuple):
    """One import of another module of the package.

    Attributes:
        target: the imported module, for example `("eval", "metrics", "probe")`.
        line: line number.
    """

    target: tuple[str, ...]
    line: int


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def module_of(file: Path) -> tuple[str, ...]:
    """Return the name of a module without the package: `("cli", "main")` for `hf_depthattn/cli/main.py`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1:] if parts[0] == PACKAGE else parts


def imports_of(file: Path, modules: set[tuple[str, ...]]) -> Iterator[Import]:
    """Yield the imports of other modules of the package in a file, including those inside functions.

    Args:
        file: the file.
        modules: all modules of the package.
    """
    folder = module_of(file)[:-1]
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = folder[: len(folder) - node.level + 1]
            elif (node.module or "").split(".")[0] == PACKAGE:
                base = ()
            else:
                continue
            name = tuple((node.module or "").split(".")) if node.module else ()
            target = base + (name if node.level else name[1:])
            for alias in node.names:
                # `from .package import module` and `from .module import name`.
                yield Import((*target, alias.name) if (*target, alias.name) in modules else target, node.lineno)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{PACKAGE}."):
                    yield Import(tuple(alias.name.split(".")[1:]), node.lineno)
