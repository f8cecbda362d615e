"""The Markdown of docstrings as reStructuredText, which autodoc reads."""

import re

# Sections of napoleon and their entries `name (type):`, which are followed by indented text that is no list.
_ENTRY = re.compile(r"^ *(?:(?:Args|Attributes|Example|Raises|Returns|Yields)|\*{0,2}\w+ \(`.*\)):$")
_FENCE = re.compile(r"^( *)```(\w*)$")
# Code in single or double backticks.
_CODE = re.compile(r"(?<!`)(``?)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\[([^\]\n]+)\]\((https?://[^)\s]+)\)")
# Stars that are products, where reStructuredText would begin emphasis; `*optional*` is emphasis.
_STAR = re.compile(r"(?<![\w*])(\*\w+\*)(?![\w*])|(?<!\*)\*(?=[\w(])|(?<=\w)\*(?!\*)")


def to_restructured_text(lines: list[str]) -> list[str]:
    """Convert code, links, fenced blocks, diagrams and lists of a docstring.

    Args:
        lines: the docstring, without its common indentation.
    """
    converted: list[str] = []
    prose: list[str] = []

    def add_code(block: list[str], indent: int, language: str) -> None:
        converted.extend(_paragraphs(prose))
        prose.clear()
        rows = [f"    {row.rstrip()}" if row.strip() else "" for row in block]
        converted.extend(["", f"{' ' * indent}.. code-block:: {language}", "", *rows, ""])

    position = 0
    while position < len(lines):
        line = lines[position]
        if fence := _FENCE.match(line):
            end = next(i for i in range(position + 1, len(lines)) if lines[i].strip() == "```")
            add_code(lines[position + 1 : end], len(fence[1]), fence[2] or "text")
            position = end + 1
            continue
        prose.append(line)
        position += 1
        if block := _diagram(line, lines[position:]):
            add_code(block, _indent(line), "text")
            position += len(block)
    return [*converted, *_paragraphs(prose)]


def _paragraphs(lines: list[str]) -> list[str]:
    return _inline("\n".join(_with_bullets(lines))).split("\n") if lines else []


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _num_indented(rows: list[str], indent: int) -> int:
    """Return how many rows there are before the first with less indentation."""
    return next((i for i, row in enumerate(rows) if row.strip() and _indent(row) < indent), len(rows))


def _diagram(line: str, rest: list[str]) -> list[str]:
    """Return the block after a line, a blank line and further indentation: an equation, a diagram or code."""
    if not line.strip() or len(rest) < 2 or rest[0].strip() or _indent(rest[1]) < _indent(line) + 4:
        return []
    return rest[: _num_indented(rest, _indent(line) + 4)]


def _with_bullets(lines: list[str]) -> list[str]:
    """Make lists of the entries that follow a line of text with a colon, such as "Parameters (float32):"."""
    converted: list[str] = []
    bullets = 0
    for position, line in enumerate(lines):
        following = lines[position + 1] if position + 1 < len(lines) else ""
        if line.strip() and _indent(line) < bullets:
            bullets = 0
            converted.append("")
        if bullets:
            line = f"{line[:bullets]}{'-' if _indent(line) == bullets else ' '} {line[bullets:].lstrip()}"
        converted.append(line.rstrip())
        if line.endswith(":") and not _ENTRY.match(line) and following.strip() and not bullets:
            bullets = _indent(following) if _indent(following) > _indent(line) else 0
            converted.extend([""] if bullets else [])
    return converted


def _inline(text: str) -> str:
    pieces, last = [], 0
    for code in _CODE.finditer(text):
        pieces += [_links(text[last : code.start()]), f"``{code[2]}``"]
        # A literal ends before a character that is no letter: an escaped blank, which is not shown, separates.
        pieces += ["\\ "] if text[code.end() : code.end() + 1].isalnum() else []
        last = code.end()
    return "".join([*pieces, _links(text[last:])])


def _links(text: str) -> str:
    return _STAR.sub(lambda star: star[1] or r"\*", _LINK.sub(r"`\1 <\2>`__", text))
