"""Puts the test mixins of the installed transformers into a cache folder, as the package `transformers_tests`.

They come from transformers' source distribution, or from a checkout of its repository, which has more of them:

    python tests/upstream/get_tests.py .cache/upstream
    python tests/upstream/get_tests.py .cache/upstream --checkout ~/src/transformers

Files that the source distribution lacks are replaced by those in `standins/`. Prints the folder for `sys.path`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

PACKAGE = "transformers_tests"
STANDINS = Path(__file__).resolve().parent / "standins"
SUBFOLDERS = ("exporters", "generation", "utils")


def download_source(folder: Path, transformers_version: str) -> Path:
    """Downloads and unpacks the source distribution, and returns its folder `tests`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    requirement = f"transformers=={transformers_version}"
    subprocess.run([*command, "--no-binary", "transformers", "--dest", str(folder), requirement], check=True)
    with tarfile.open(folder / f"transformers-{transformers_version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"transformers-{transformers_version}" / "tests"


def copy_tests(tests: Path, target: Path) -> None:
    """Copies the modules that hold mixins, as a package that is importable beside our own folder `tests`."""
    files = [*tests.glob("*.py"), *(file for name in SUBFOLDERS for file in (tests / name).glob("*.py"))]
    for file in files:
        copy = target / file.relative_to(tests)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8")
        copy.write_text(re.sub(r"^(\s*from )tests\.", rf"\1{PACKAGE}.", text, flags=re.MULTILINE), encoding="utf-8")
    for file in STANDINS.rglob("*.py"):
        copy = target / file.relative_to(STANDINS)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    for folder in (target, *(target / name for name in SUBFOLDERS)):
        (folder / "__init__.py").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="folder for the tests, outside version control")
    parser.add_argument("--checkout", type=Path, help="checkout of the transformers repository, best of that version")
    args = parser.parse_args()

    transformers_version = version("transformers")
    name = f"checkout-{transformers_version}" if args.checkout else transformers_version
    home = (args.cache / name).resolve()
    if args.checkout or not home.is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as work:
            tests = args.checkout / "tests" if args.checkout else download_source(Path(work), transformers_version)
            if not (tests / "test_modeling_common.py").is_file():
                sys.exit(f"{tests} has no test_modeling_common.py")
            new = Path(work) / "new"
            copy_tests(tests, new / PACKAGE)
            shutil.rmtree(home, ignore_errors=True)
            new.rename(home)
    print(home)


if __name__ == "__main__":
    main()
