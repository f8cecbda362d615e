"""Loaders of local benchmark items, which lm-eval calls as `custom_dataset(**metadata, **dataset_kwargs)`.

The metadata contain, among others, the arguments of the model, so every loader accepts and ignores `**_`. Data sets
are built in memory; from files, `datasets` would copy them to its cache.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset

from ...errors import UserError
from ...utils.json_lines import json_lines
from ...utils.paths import read_text
from ...utils.result_files import read_object
from ..data_folder import data_file

_ARTICLE_HEADING = re.compile(r"^ = [^=].* = \n", re.MULTILINE)
_MAX_PASSAGE_CHARACTERS = 20_000
_ADVICE = "download the local data again"


def jsonl(*, file: str, **_: object) -> dict[str, Dataset]:
    """Load a file with one item per line; the split is `test`."""
    path = data_file(file)
    return {"test": Dataset.from_list([item for _, item in json_lines(path, read_text(path))])}


def mmlu(*, subject: str, **_: object) -> dict[str, Dataset]:
    """Load a subject of MMLU with the columns of `cais/mmlu` (question, choices, answer); splits `dev` and `test`."""
    return {
        split: Dataset.from_list(_mmlu_rows(f"tasks/mmlu/{split}/{subject}_{split}.csv")) for split in ("dev", "test")
    }


def _mmlu_rows(file: str) -> list[dict[str, Any]]:
    path = data_file(file)
    with _complete(path):
        return [
            {
                "question": row["question"],
                "choices": [row[f"choice{i}"] for i in range(4)],
                "answer": int(row["answer"]),
            }
            for row in csv.DictReader(io.StringIO(read_text(path)))
        ]


def bbh(*, subtask: str, **_: object) -> dict[str, Dataset]:
    """Load a task of BIG-Bench Hard with the columns of `SaylorTwift/bbh` (input, target)."""
    path = data_file(f"tasks/bbh/{subtask}.json")
    items = read_object(path, _ADVICE)
    with _complete(path):
        rows = [{"input": item["input"], "target": item["target"]} for item in items["examples"]]
    return {"test": Dataset.from_list(rows)}


@contextmanager
def _complete(path: Path) -> Iterator[None]:
    """Name the file if a value is missing in it, or of another type."""
    try:
        yield
    except (KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: is damaged; {_ADVICE}.") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is damaged; {_ADVICE}.") from error


def wikitext2(**_: object) -> dict[str, Dataset]:
    """Load the articles of WikiText-2's test split; column `page`, as in `EleutherAI/wikitext_document_level`."""
    text = read_text(data_file("wikitext2/test.txt"))
    starts = [match.start() for match in _ARTICLE_HEADING.finditer(text)]
    ends = [*starts[1:], len(text)]
    return {"test": Dataset.from_list([{"page": text[a:b]} for a, b in zip(starts, ends, strict=True)])}


def books(**_: object) -> dict[str, Dataset]:
    """Load the validation books, split into passages of whole paragraphs so that `--limit` can be used."""
    files = sorted(data_file("books/validation").glob("*.md"))
    passages = [passage for file in files for passage in _passages(read_text(file))]
    return {"test": Dataset.from_list([{"text": passage} for passage in passages])}


def _passages(text: str) -> list[str]:
    passages: list[list[str]] = [[]]
    length = 0
    for paragraph in text.split("\n\n"):
        if passages[-1] and length + len(paragraph) > _MAX_PASSAGE_CHARACTERS:
            passages.append([])
            length = 0
        passages[-1].append(paragraph)
        length += len(paragraph) + 2
    return ["\n\n".join(paragraphs) for paragraphs in passages]
