"""Run mypy on the package, `examples/` and `benchmarks/`.

`kernels/`, `conversion/` and `eval/` are sub-packages of `hf_depthattn`, but their folders are outside its folder (see
pyproject.toml). mypy does not support this, so it runs in a temporary tree of links in which they are inside.
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
    """Fill an empty folder with links, in the layout of the installed package."""
    (tree / PACKAGE).mkdir()
    for path in (ROOT / PACKAGE).iterdir():
        (tree / PACKAGE / path.name).symlink_to(path)
    for name in MAPPED_FOLDERS:
        (tree / PACKAGE / name).symlink_to(ROOT / name)
    for name in SCRIPT_FOLDERS:
        (tree / name).symlink_to(ROOT / name)


def main() -> int:
    """Run mypy and return its exit code."""
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        make_tree(tree)
        environment = {**os.environ, "MYPYPATH": os.pathsep.join(str(tree / name) for name in ("", *SCRIPT_FOLDERS))}
        command = [sys.executable, "-m", "mypy", *settings, PACKAGE, *SCRIPT_FOLDERS, *sys.argv[1:]]
        return subprocess.run(command, cwd=tree, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
