"""Write a repository for the Kernel Hub from the kernel files of this package.

    python -m hf_depthattn.conversion.kernel_hub OUT [--repo-id NAME/depthattn-kernels]

OUT must not exist. It will contain the sources for kernel-builder and the build itself, which for kernels without
compiled code is a copy of the Python files:

    build.toml  flake.nix  CARD.md  LICENSE  tests/
    torch-ext/depthattn_kernels/        the sources; kernel-builder adds `_ops.py`
    build/torch-cuda/, torch-rocm/      the sources with `_ops.py` and `metadata.json`, ready to upload

The Hub requires unique op names in every build, so that several versions can be loaded: the namespace `depthattn` is
replaced by one with a hash of the files. Nothing else is changed.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from .. import __version__
from ..conversion import kernel_hub_templates as templates
from ..errors import UserError
from .output_folder import complete_folder

NAME = "depthattn-kernels"
PACKAGE = NAME.replace("-", "_")
#: Version 0: the interface may still change.
VERSION = 0
#: Backends of the build. Ops without a kernel for AMD return the reason from their `_limit` function.
BACKENDS = ("cuda", "rocm")
#: Modules whose public functions are the interface of the repository.
INTERFACE = "*_ops.py"
_NAMESPACE = "depthattn"


def write_repository(target: Path, repo_id: str | None = None) -> Path:
    """Write the repository; after an error there is no partial output.

    Args:
        target: the folder to create.
        repo_id: id on the Hub, for build.toml and the card.

    Returns:
        The folder.

    Raises:
        UserError: if the folder exists or cannot be written.
    """
    if repo_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"--repo-id {repo_id}: must be OWNER/NAME.")
    target = target.resolve()
    with complete_folder(target, overwrite=False, is_checkpoint=False) as folder:
        modules = hub_modules()
        functions = public_functions(modules)
        modules["__init__.py"] = _init_file(functions)
        _write(folder / "torch-ext" / PACKAGE, modules)
        build_id = _hash("\n".join(f"{name}\n{text}" for name, text in sorted(modules.items())))
        for backend in BACKENDS:
            _write(folder / "build" / f"torch-{backend}", _build(modules, backend, build_id))
        hub = templates.HUB_SECTION.format(repo_id=repo_id) if repo_id else ""
        backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
        files = {
            "build.toml": templates.BUILD_TOML.format(name=NAME, version=VERSION, backends=backends, hub=hub),
            "flake.nix": templates.FLAKE_NIX,
            "CARD.md": _card(functions, repo_id or f"OWNER/{NAME}"),
            "LICENSE": _license_text(),
            f"tests/test_{PACKAGE}.py": templates.TEST_PY.format(package=PACKAGE),
        }
        _write(folder, files)
    return target


def hub_modules() -> dict[str, str]:
    """Return the text of the kernel files by name, with ops in the namespace of a build.

    Raises:
        UserError: if a file uses the namespace of this package in a form that cannot be replaced.
    """
    found = {}
    for file in sorted(_kernel_folder().glob("*.py")):
        text = file.read_text(encoding="utf-8")
        changed = re.sub(rf'(f?"){_NAMESPACE}::([\w{{}}]+")', r"add_op_namespace_prefix(\1\2)", text)
        changed = re.sub(rf"\btorch\.ops\.{_NAMESPACE}\b", "ops", changed)
        if changed != text:
            changed = _with_import(changed, "from ._ops import add_op_namespace_prefix, ops")
        if re.search(rf"{_NAMESPACE}::|ops\.{_NAMESPACE}\b", changed):
            raise UserError(f"{file.name}: uses the namespace {_NAMESPACE!r} in a form that cannot be replaced.")
        found[file.name] = changed
    return found


def public_functions(modules: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Return module -> (name, first line of the docstring) of its public functions, for the modules in `INTERFACE`."""
    found = {}
    for name, text in modules.items():
        if not Path(name).match(INTERFACE):
            continue
        nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        public = [node for node in nodes if not node.name.startswith("_")]
        found[Path(name).stem] = [(node.name, (ast.get_docstring(node) or "").split("\n")[0]) for node in public]
    return found


def _with_import(text: str, line: str) -> str:
    """Insert an import before the first relative import, or after the last import at the top level."""
    lines = text.splitlines()
    tops = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    relative = [node for node in tops if isinstance(node, ast.ImportFrom) and node.level]
    index = relative[0].lineno - 1 if relative else tops[-1].end_lineno
    return "\n".join([*lines[:index], line, *lines[index:]]) + "\n"


def _init_file(functions: dict[str, list[tuple[str, str]]]) -> str:
    imports = [f"from .{module} import {', '.join(name for name, _ in found)}" for module, found in functions.items()]
    names = sorted(name for found in functions.values() for name, _ in found)
    return templates.INIT_PY.format(imports="\n".join(imports), names="\n".join(f'    "{name}",' for name in names))


def _build(modules: dict[str, str], backend: str, build_id: str) -> dict[str, str]:
    """Return the files of one build variant."""
    ops_name = f"_{PACKAGE}_{backend}_{build_id}"
    files = dict(modules)
    files["_ops.py"] = templates.OPS_PY.format(ops_name=ops_name)
    files[f"{PACKAGE}/__init__.py"] = templates.COMPATIBILITY_PY.format(package=PACKAGE)
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in sorted(files.items())}
    description = {
        "name": NAME,
        "id": ops_name,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }
    files["metadata.json"] = json.dumps(description, indent=2) + "\n"
    return files


def _card(functions: dict[str, list[tuple[str, str]]], repo_id: str) -> str:
    lines = [f"- `{name}`: {text}" for found in functions.values() for name, text in found]
    return templates.CARD_MD.format(
        name=NAME,
        repo_id=repo_id,
        version=VERSION,
        package_version=__version__,
        functions="\n".join(lines),
    )


def _kernel_folder() -> Path:
    spec = find_spec("hf_depthattn.kernels.triton_runtime")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _license_text() -> str:
    checkout = _kernel_folder().parent / "LICENSE"
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    for file in metadata.files("hf-depthattn") or ():
        if file.name == "LICENSE":
            return file.read_text(encoding="utf-8")
    raise UserError("LICENSE: is neither in the checkout nor in the installed package; reinstall the package.")


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, 2 after a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to create")
    parser.add_argument("--repo-id", default=None, help="OWNER/NAME on the Hub, for build.toml and the card")
    arguments = parser.parse_args(argv)
    try:
        target = write_repository(arguments.out, arguments.repo_id)
    except UserError as error:
        print(f"kernel_hub: error: {error}", file=sys.stderr)
        return 2
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
