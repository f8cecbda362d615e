"""The code blocks of README.md and docs/, and what tests do with each.

A block is run as it is written, unless a comment in the line before it says otherwise:

    <!-- test: slow -->                        run it with the slow tests only
    <!-- test: parse, needs a GPU -->          do not run it; the reason is required

Code that only the test needs comes before a block, in a comment that readers do not see:

    <!-- test: setup
    trainer = ...
    -->
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Model cards: their code is that of a model on the Hub, and is not run.
CARDS = sorted((ROOT / "model_cards").glob("*.md"))

_BLOCK = re.compile(
    r"^<!-- test: setup\n(?P<setup>.*?)^-->$"
    r"|(?:^(?P<mark_indent> *)<!-- test: (?P<mark>[^\n]*) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
#: Mark -> when the block runs.
MODES = ("fast", "slow", "parse")


@dataclass(frozen=True)
class Block:
    """A code block of a document.

    Attributes:
        place: document and line.
        language: the first word after the backticks.
        code: the text, without its indentation.
        mode: one of `MODES`.
        is_setup: whether it is a hidden block.
    """

    place: str
    language: str
    code: str
    mode: str = "fast"
    is_setup: bool = False


def blocks_of(document: Path) -> list[Block]:
    """Return the blocks of a document in their order.

    Args:
        document: a Markdown file.

    Raises:
        ValueError: if a mark is unknown, or has no reason although it excludes the block.
    """
    return parse_blocks(document.read_text(encoding="utf-8"), document.relative_to(ROOT).as_posix())


def parse_blocks(text: str, name: str) -> list[Block]:
    """Return the blocks of a text.

    Args:
        text: Markdown.
        name: its name, for `Block.place`.

    Raises:
        ValueError: if a mark is unknown, or has no reason although it excludes the block.
    """
    blocks, num_fences, num_marks = [], 0, 0
    for found in _BLOCK.finditer(text):
        place = f"{name}, line {text.count(chr(10), 0, found.start()) + 1}"
        num_marks += found["setup"] is not None or found["mark"] is not None
        if found["setup"] is not None:
            blocks.append(Block(place, "python", found["setup"], is_setup=True))
            continue
        mode, _, reason = (found["mark"] or "fast").partition(", ")
        if mode not in MODES or (mode == "parse" and not reason):
            raise ValueError(f"{place}: mark {found['mark']!r}; allowed are 'slow' and 'parse, REASON'")
        blocks.append(Block(place, found["language"].strip(), textwrap.dedent(found["code"]), mode))
        num_fences += 2
    if num_fences != len(re.findall(r"^ *```", text, re.MULTILINE)):
        raise ValueError(f"{name}: a block that is not closed")
    if num_marks != len(re.findall(r"^ *<!-- test:", text, re.MULTILINE)):
        raise ValueError(f"{name}: a mark that is not in the line before a block")
    return blocks


def mentions_of(text: str) -> list[str]:
    """Return the commands in the sentences and tables of a text.

    Args:
        text: Markdown.
    """
    sentences = _BLOCK.sub("", text)
    return re.findall(r"`((?:depthattn|make|python|accelerate|torchrun) [^`]+)`", sentences)
