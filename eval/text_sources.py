"""The texts that `depthattn eval --perplexity` is given: files, folders, JSON and data sets, as lists of documents."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..utils.paths import read_text, user_path

DATASET_PREFIX = "hf:"
_TEXT_SUFFIXES, _LINES_SUFFIXES = (".txt", ".md"), (".jsonl", ".ndjson")
# As text they would be scored with their quotes, commas and tags, or cannot be read at all.
_NO_TEXT = (".csv", ".tsv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip", ".pdf", ".docx")


def read_domains(
    arguments: Iterable[str], say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> dict[str, list[str]]:
    """Documents of the domains that are named on a command line.

    Args:
        arguments: each `SOURCE` or `NAME=SOURCE`; an argument that is itself a path is a source. A source is

            - a UTF-8 file, which is one document;
            - a `.jsonl` or `.ndjson` file, with the field `text` of each line;
            - a `.json` file, a list of strings or of objects with a field `text`;
            - a folder: its `.txt` and `.md` files are documents, its `.jsonl` and `.ndjson` files lists of them;
            - a data set as `hf:ID[@CONFIG]:SPLIT[:COLUMN]`, column `text` by default.

            Endings may be written in capitals. A byte-order mark is not part of a text.
        say: is told which files of a folder are left out.

    Raises:
        UserError: a source does not exist, is not text, holds none, or a name occurs twice.
    """
    domains: dict[str, list[str]] = {}
    for argument in arguments:
        name, source = _name_and_source(argument)
        if name in domains:
            raise UserError(f"--perplexity {argument}: the name {name} occurs twice; give NAME=SOURCE.")
        domains[name] = [text for text in _documents(source, say) if text.strip()]
        if not domains[name]:
            raise UserError(f"--perplexity {argument}: holds no text.")
    return domains


def _name_and_source(argument: str) -> tuple[str, str]:
    if argument.startswith(DATASET_PREFIX):
        return argument, argument
    name, equals, source = argument.partition("=")
    # `lr=0.1/book.txt` is a path, and `runs/lr=0.1/book.txt` can be nothing else.
    if not equals or "/" in name or user_path(argument).exists():
        return user_path(argument).name or argument, argument
    if not name or not source:
        raise UserError(f"--perplexity {argument}: must be SOURCE or NAME=SOURCE.")
    if not source.startswith(DATASET_PREFIX) and not user_path(source).exists():
        raise UserError(f"--perplexity {argument}: there is neither a file of this name nor {source}.")
    return name, source


def _documents(source: str, say: Callable[[str], None]) -> list[str]:
    if source.startswith(DATASET_PREFIX):
        return _dataset_documents(source)
    path = user_path(source)
    return _folder_documents(path, say) if path.is_dir() else _file_documents(path)


def _folder_documents(folder: Path, say: Callable[[str], None]) -> list[str]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    read = [file for file in files if file.suffix.lower() in (*_TEXT_SUFFIXES, *_LINES_SUFFIXES)]
    if len(read) < len(files):
        endings = ", ".join((*_TEXT_SUFFIXES, *_LINES_SUFFIXES))
        say(f"{folder}: {len(read)} of {len(files)} files are read, those that end in {endings}")
    return [text for file in read for text in _file_documents(file)]


def _file_documents(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix in _NO_TEXT:
        raise UserError(f"{path}: {suffix} files are not text; give a text file, or .jsonl with a field 'text'.")
    text = read_text(path)
    if suffix in _LINES_SUFFIXES:
        return _json_lines(path, text)
    if suffix == ".json":
        return _json_documents(path, text)
    return [text]


def _json_lines(path: Path, content: str) -> list[str]:
    documents = []
    # By line feeds alone: `splitlines` would also cut at characters such as U+2028, which JSON allows inside strings.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not a JSON object with a field 'text'.") from error
            documents.append(_text_of(item, where))
    return documents


def _json_documents(path: Path, content: str) -> list[str]:
    try:
        items = json.loads(content)
    except (ValueError, RecursionError):
        # Data sets often call JSON Lines `.json`.
        return _json_lines(path, content)
    if isinstance(items, dict):
        return [_text_of(items, str(path))]
    if not isinstance(items, list):
        raise UserError(f"{path}: holds neither texts nor objects with a field 'text'.")
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
        raise UserError(f"{where}: the text has half a character in it (U+{code:04X}, a surrogate).") from error
    return text


def _dataset_documents(source: str) -> list[str]:
    from ..errors.messages import one_line

    parts = source.removeprefix(DATASET_PREFIX).split(":")
    if len(parts) not in (2, 3):
        raise UserError(f"--perplexity {source}: must be hf:ID[@CONFIG]:SPLIT[:COLUMN].")
    (dataset_id, _, config), split, column = parts[0].partition("@"), parts[1], (parts[2:] or ["text"])[0]
    try:
        from datasets import load_dataset

        texts = list(load_dataset(dataset_id, config or None, split=split)[column])
    except ImportError as error:
        raise UserError("datasets is not installed; pip install 'hf-depthattn[eval]'.") from error
    except Exception as error:
        # What hosts and readers of data sets raise has no common class.
        raise UserError(f"--perplexity {source}: the data could not be loaded: {one_line(error)}") from error
    return [_checked(text, f"--perplexity {source}: row {number}") for number, text in enumerate(texts)]
