"""The corpora of the study, as bytes: Python's standard library, and the books of the local data if there are any."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hf_depthattn.eval.data_folder import data_file

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@dataclass(frozen=True)
class Corpus:
    """Text for training and for evaluation.

    Attributes:
        train: bytes, `[N]`, uint8.
        heldout: bytes of other files, `[M]`, uint8.
        sha256: hash of both. The standard library differs between versions of Python.
    """

    train: Tensor
    heldout: Tensor
    sha256: str

    def facts(self) -> dict[str, object]:
        """Return its sizes and its hash as JSON values."""
        return {"train_bytes": len(self.train), "heldout_bytes": len(self.heldout), "sha256": self.sha256}


def _standard_library() -> tuple[list[Path], list[Path]]:
    # The corpus of the demo, whose folder is no package.
    if str(_EXAMPLES) not in sys.path:
        sys.path.append(str(_EXAMPLES))
    from demo_model.stdlib_corpus import split, stdlib_files

    return split(stdlib_files())


def _books() -> tuple[list[Path], list[Path]]:
    train, heldout = (sorted(data_file(f"books/{part}").glob("*.md")) for part in ("train", "validation"))
    return train, heldout


#: Name -> function that returns the files for training and those for evaluation.
CORPORA: dict[str, Callable[[], tuple[list[Path], list[Path]]]] = {
    "stdlib": _standard_library,
    "books": _books,
}


@cache
def read_corpus(name: str) -> Corpus:
    """Read a corpus.

    Args:
        name: a key of `CORPORA`.

    Raises:
        UserError: if there is no local data.
        FileNotFoundError: if the standard library has no sources.
    """
    train, heldout = map(_joined, CORPORA[name]())
    digest = hashlib.sha256(len(train).to_bytes(8, "big") + train + heldout).hexdigest()
    of_train, of_heldout = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, heldout))
    return Corpus(of_train, of_heldout, digest)


def _joined(files: Sequence[Path]) -> bytes:
    # A zero byte marks the end of a file; no text contains it.
    return b"".join(path.read_bytes() + b"\0" for path in files)
