"""Docstrings for the docs site: what is Markdown in them becomes what autodoc reads."""

import inspect

import pytest
from repository import ROOT


@pytest.fixture
def convert(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from docstring_markup import to_restructured_text

    return lambda text: "\n".join(to_restructured_text(inspect.cleandoc(text).split("\n")))


def test_code_links_and_stars(convert):
    assert convert("the `x`s of [a paper](https://arxiv.org/abs/1) are a * b, **kwargs, c*d and *optional*") == (
        "the ``x``\\ s of `a paper <https://arxiv.org/abs/1>`__ are a * b, **kwargs, c\\*d and *optional*"
    )


def test_code_spans_two_lines(convert):
    assert convert("a `long\nspan` of code") == "a ``long\nspan`` of code"


def test_an_indented_block_is_a_diagram_as_it_is(convert):
    text = convert("The data flow:\n\n    a * b ---> `c`:\n               d\n\nAfter it.")
    rows = "        a * b ---> `c`:\n                   d\n"
    assert text == f"The data flow:\n\n.. code-block:: text\n\n\n{rows}\n\nAfter it."


def test_a_fenced_block_keeps_its_language(convert):
    assert ".. code-block:: python\n\n    >>> f(*x)" in convert("Example:\n\n```python\n>>> f(*x)\n```")


def test_entries_after_a_colon_become_a_list(convert):
    text = convert("Parameters (float32),\nat every site:\n    a `[1]`: one,\n        or two.\n    b: three.\nEnd.")
    assert text == (
        "Parameters (float32),\nat every site:\n\n    - a ``[1]``: one,\n      or two.\n    - b: three.\n\nEnd."
    )


def test_sections_and_typed_arguments_are_left_to_napoleon(convert):
    text = "Sum.\n\nArgs:\n    a (``int``):\n        the first.\n    b: the second."
    assert convert(text.replace("``", "`")) == text
