"""Runs mypy over every package, `examples/` and `benchmarks/`.

`kernels/`, `conversion/` and `eval/` are sub-packages of `hf_depthattn` that lie beside it (see pyproject.toml). mypy
knows packages by their folders only, so it is shown a tree in which they lie inside, made of links.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "hf_depthattn"
MAPPED_FOLDERS = ("kernels", "conversion", "eval")
SCRIPT_FOLDERS = ("benchmarks", "examples")


def make_tree(tree: Path) -> None:
    """Fill an empty folder with links to the files as an installed package has them."""
    (tree / PACKAGE).mkdir()
    for path in (ROOT / PACKAGE).iterdir():
        (tree / PACKAGE / path.name).symlink_to(path)
    for name in MAPPED_FOLDERS:
        (tree / PACKAGE / name).symlink_to(ROOT / name)
    for name in SCRIPT_FOLDERS:
        (tree / name).symlink_to(ROOT / name)


def main() -> int:
    """Check, and return mypy's exit status."""
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        make_tree(tree)
        environment = {**os.environ, "MYPYPATH": os.pathsep.join(str(tree / name) for name in ("", *SCRIPT_FOLDERS))}
        command = [sys.executable, "-m", "mypy", *settings, PACKAGE, *SCRIPT_FOLDERS, *sys.argv[1:]]
        return subprocess.run(command, cwd=tree, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
