"""Loaders of local benchmark items, which lm-eval calls as `custom_dataset(**metadata, **dataset_kwargs)`.

The metadata contain, among others, the arguments of the model, so every loader accepts and ignores `**_`. Data sets
are built in memory; from files, `datasets` would copy them to its cache.
"""

from __future__ import annotations

import csv
import json
import re
from typing import Any

from datasets import Dataset

from ..data_folder import data_file

_ARTICLE_HEADING = re.compile(r"^ = [^=].* = \n", re.MULTILINE)
_MAX_PASSAGE_CHARACTERS = 20_000


def jsonl(*, file: str, **_: object) -> dict[str, Dataset]:
    """Load a file with one item per line; the split is `test`."""
    with data_file(file).open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines if line.strip()])}


def mmlu(*, subject: str, **_: object) -> dict[str, Dataset]:
    """Load a subject of MMLU with the columns of `cais/mmlu` (question, choices, answer); splits `dev` and `test`."""
    return {
        split: Dataset.from_list(_mmlu_rows(f"tasks/mmlu/{split}/{subject}_{split}.csv")) for split in ("dev", "test")
    }


def _mmlu_rows(file: str) -> list[dict[str, Any]]:
    with data_file(file).open(encoding="utf-8", newline="") as rows:
        return [
            {
                "question": row["question"],
                "choices": [row[f"choice{i}"] for i in range(4)],
                "answer": int(row["answer"]),
            }
            for row in csv.DictReader(rows)
        ]


def bbh(*, subtask: str, **_: object) -> dict[str, Dataset]:
    """Load a task of BIG-Bench Hard with the columns of `SaylorTwift/bbh` (input, target)."""
    items = json.loads(data_file(f"tasks/bbh/{subtask}.json").read_text(encoding="utf-8"))["examples"]
    return {"test": Dataset.from_list([{"input": item["input"], "target": item["target"]} for item in items])}


def wikitext2(**_: object) -> dict[str, Dataset]:
    """Load the articles of WikiText-2's test split; column `page`, as in `EleutherAI/wikitext_document_level`."""
    text = data_file("wikitext2/test.txt").read_text(encoding="utf-8")
    starts = [match.start() for match in _ARTICLE_HEADING.finditer(text)]
    ends = [*starts[1:], len(text)]
    return {"test": Dataset.from_list([{"page": text[a:b]} for a, b in zip(starts, ends, strict=True)])}


def books(**_: object) -> dict[str, Dataset]:
    """Load the validation books, split into passages of whole paragraphs so that `--limit` can be used."""
    files = sorted(data_file("books/validation").glob("*.md"))
    passages = [passage for file in files for passage in _passages(file.read_text(encoding="utf-8"))]
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
