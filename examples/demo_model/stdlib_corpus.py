"""Text corpus available in every Python installation: the source code of its standard library.

Files are split by a stable hash of their name relative to the standard library, so a module is held out on every
Python version or on none.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_depthattn.pretraining.packing import pack

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

HELDOUT_ONE_IN = 20
MAX_FILE_BYTES = 300_000
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
)
SKIPPED_FILES = frozenset({"html/entities.py", "pydoc_data/topics.py"})


def stdlib_root() -> Path:
    """Return the folder of the standard library."""
    return Path(sysconfig.get_path("stdlib")).resolve()


def relative_name(path: Path) -> str:
    """Return the name of a file relative to the standard library, with forward slashes on every platform."""
    return path.relative_to(stdlib_root()).as_posix()


def stdlib_files() -> list[Path]:
    """List the standard library's hand-written modules, sorted by relative name.

    Excludes installed packages, tests, character and entity tables, build settings, empty files and files larger than
    `MAX_FILE_BYTES`.

    Returns:
        The paths of the files.

    Raises:
        FileNotFoundError: If the standard library has no readable source files (for example, one packed in a zip).
    """
    root = stdlib_root()
    files = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        folders = name.split("/")[:-1]
        if SKIPPED_FOLDERS.intersection(folders) or any(folder.startswith("config-") for folder in folders):
            continue
        if name in SKIPPED_FILES or name.startswith("_sysconfigdata"):
            continue
        if path.is_file() and 0 < path.stat().st_size <= MAX_FILE_BYTES:
            files[name] = path
    if not files:
        raise FileNotFoundError(
            f"No .py files in the standard library folder {root}: this Python has no standard library sources on disk "
            "(it may be packed in a zip file). Use a Python installed with its sources."
        )
    return [files[name] for name in sorted(files)]


def is_heldout(name: str) -> bool:
    """Return whether a file belongs to the held-out part, given its relative name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELDOUT_ONE_IN == HELDOUT_ONE_IN - 1


def split(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Split files into a training part and a held-out part of about 5 % of the files.

    Args:
        files: Paths inside the standard library, as given by `stdlib_files`.

    Returns:
        The training files and the held-out files, each in the order of `files`.
    """
    train: list[Path] = []
    heldout: list[Path] = []
    for path in files:
        (heldout if is_heldout(relative_name(path)) else train).append(path)
    return train, heldout


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """Yield the text of each file."""
    for path in files:
        yield path.read_text(encoding="utf-8", errors="replace")


def token_blocks(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], block_size: int) -> Tensor:
    """Join documents, each followed by the end-of-sequence token, and split them into blocks.

    Args:
        tokenizer: Tokenizer with an end-of-sequence token.
        texts: The documents.
        block_size: Tokens per block.

    Returns:
        Token ids of shape `[n, block_size]`; the incomplete last block is dropped.
    """
    return pack(tokenizer, list(texts), block_size).long()
