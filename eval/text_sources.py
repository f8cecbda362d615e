"""Read texts named on a command line (files, folders, JSON, data sets) as lists of documents."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..utils.json_lines import json_lines
from ..utils.paths import read_text, user_path

DATASET_PREFIX = "hf:"
_TEXT_SUFFIXES, _LINES_SUFFIXES = (".txt", ".md"), (".jsonl", ".ndjson")
# Binary files, or tables whose quotes and separators would be scored as text.
_NO_TEXT = (".csv", ".tsv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip", ".pdf", ".docx")


def read_domains(
    arguments: Iterable[str], say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> dict[str, list[str]]:
    """Read the documents of each domain of `depthattn eval --perplexity`.

    Args:
        arguments: each `SOURCE` or `NAME=SOURCE`; an argument that is an existing path is a source. A source is one of

            - a UTF-8 file, which is one document;
            - a `.jsonl` or `.ndjson` file, whose lines have a field `text`;
            - a `.json` file with a list of strings or of objects with a field `text`;
            - a folder: each `.txt` or `.md` file is a document, each `.jsonl` or `.ndjson` file a list of documents;
            - a data set as `hf:ID[@CONFIG]:SPLIT[:COLUMN]`, column `text` by default.

            Suffixes are case-insensitive. A byte-order mark is removed.
        say: called with a message if files of a folder are ignored.

    Raises:
        UserError: if a source does not exist, is not text or is empty, or a name occurs twice.
    """
    domains: dict[str, list[str]] = {}
    for argument in arguments:
        name, source = _name_and_source(argument)
        if name in domains:
            raise UserError(f"--perplexity {argument}: the name {name} occurs twice; give NAME=SOURCE.")
        domains[name] = read_documents(source, say, name=f"--perplexity {argument}")
    return domains


def read_documents(
    source: str,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    *,
    name: str | None = None,
    endings: tuple[str, ...] = (),
) -> list[str]:
    """Read the documents of one source, as in `read_domains`.

    Args:
        source: a file, a folder, or a data set as `hf:ID[@CONFIG]:SPLIT[:COLUMN]`.
        say: called with a message if files of a folder are ignored.
        name: name of the source in messages; the source itself by default.
        endings: further endings of text files in a folder, such as `.py`.

    Returns:
        The documents, without empty ones; at least one.

    Raises:
        UserError: if the source does not exist, is not text or is empty.
    """
    name = source if name is None else name
    if source.startswith(DATASET_PREFIX):
        documents = _dataset_documents(source, name)
    else:
        path = user_path(source)
        documents = _folder_documents(path, say, endings) if path.is_dir() else _file_documents(path)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise UserError(f"{name}: contains no text.")
    return documents


def _name_and_source(argument: str) -> tuple[str, str]:
    if argument.startswith(DATASET_PREFIX):
        return argument, argument
    name, equals, source = argument.partition("=")
    # `lr=0.1/book.txt` may be an existing path; in `runs/lr=0.1/book.txt` the part before `=` is not a name.
    if not equals or "/" in name or user_path(argument).exists():
        return user_path(argument).name or argument, argument
    if not name or not source:
        raise UserError(f"--perplexity {argument}: must be SOURCE or NAME=SOURCE.")
    if not source.startswith(DATASET_PREFIX) and not user_path(source).exists():
        raise UserError(f"--perplexity {argument}: neither a file of this name nor {source} exists.")
    return name, source


def _folder_documents(folder: Path, say: Callable[[str], None], endings: tuple[str, ...]) -> list[str]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    suffixes = (*_TEXT_SUFFIXES, *_LINES_SUFFIXES, *endings)
    read = [file for file in files if file.suffix.lower() in suffixes]
    if len(read) < len(files):
        say(f"{folder}: reading {len(read)} of {len(files)} files, those that end in {', '.join(suffixes)}")
    return [text for file in read for text in _file_documents(file)]


def _file_documents(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix in _NO_TEXT:
        raise UserError(f"{path}: {suffix} files are not text; use a text file, or .jsonl with a field 'text'.")
    text = read_text(path)
    if suffix in _LINES_SUFFIXES:
        return _json_lines(path, text)
    if suffix == ".json":
        return _json_documents(path, text)
    return [text]


def _json_lines(path: Path, content: str) -> list[str]:
    lines = json_lines(path, content, "is not a JSON object with a field 'text'")
    return [_text_of(item, where) for where, item in lines]


def _json_documents(path: Path, content: str) -> list[str]:
    try:
        items = json.loads(content)
    except (ValueError, RecursionError):
        # Many data sets use `.json` for JSON Lines.
        return _json_lines(path, content)
    if isinstance(items, dict):
        return [_text_of(items, str(path))]
    if not isinstance(items, list):
        raise UserError(f"{path}: contains neither texts nor objects with a field 'text'.")
    return [
        _checked(item, where) if isinstance(item, str) else _text_of(item, where)
        for item, where in ((item, f"{path}: item {number}") for number, item in enumerate(items, start=1))
    ]


def _text_of(item: Any, where: str) -> str:
    if not isinstance(item, dict) or "text" not in item:
        raise UserError(f"{where} is not a JSON object with a field 'text'.")
    return _checked(item["text"], where)


def _checked(text: Any, where: str) -> str:
    if not isinstance(text, str):
        kind = {"NoneType": "null", "int": "a number", "float": "a number", "list": "a list", "dict": "an object"}
        name = type(text).__name__
        raise UserError(f"{where}: the text is {kind.get(name, name)}, not a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"{where}: the text contains a lone surrogate (U+{code:04X}).") from error
    return text


def _dataset_documents(source: str, name: str) -> list[str]:
    from ..errors.messages import one_line

    parts = source.removeprefix(DATASET_PREFIX).split(":")
    if len(parts) not in (2, 3):
        raise UserError(f"{name}: must be hf:ID[@CONFIG]:SPLIT[:COLUMN].")
    (dataset_id, _, config), split, column = parts[0].partition("@"), parts[1], (parts[2:] or ["text"])[0]
    try:
        from datasets import load_dataset

        texts = list(load_dataset(dataset_id, config or None, split=split)[column])
    except ImportError as error:
        raise UserError("datasets is not installed; pip install 'hf-depthattn[eval]'.") from error
    except Exception as error:
        # The Hub and the readers of `datasets` raise errors of many classes.
        raise UserError(f"{name}: the data could not be loaded: {one_line(error)}") from error
    return [_checked(text, f"{name}: row {number}") for number, text in enumerate(texts)]
