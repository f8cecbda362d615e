"""docs/pipeline.md: its figure, code and messages are those of the code; test_readme.py checks its tables."""

import ast
import re

import needs_stage_interface  # noqa: F401
import pytest
from repository import ROOT
from torch.distributed.pipelining.schedules import get_schedule_class

from benchmarks.pipeline_traffic import FIGURE, PANELS, figure_rows

PAGE = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")


def test_figure_has_the_numbers_of_the_plan():
    label = r'aria-label="boundary between stages: (\d+); [^"]*: ([\d.]+); kind: ([^"]+)"'
    points = re.findall(label, FIGURE.read_text(encoding="utf-8"))
    # Lines have the label of their first point.
    drawn = {(int(number), float(units), kind) for number, units, kind in points}
    rows = [row for case in PANELS.values() for row in figure_rows(case)]
    assert drawn == {(row["boundary"], row["units"], row["kind"]) for row in rows}
    assert f"({FIGURE.name})" in PAGE


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_code_is_python_and_names_what_exists(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = __import__(node.module, fromlist=["names"])
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_schedules_exist():
    (table,) = re.findall(r"\| `schedule` .*?\n\n", PAGE, re.DOTALL)
    names = re.findall(r'`"(\w+)"`', table)
    assert len(names) == 7
    assert all(get_schedule_class(name) for name in names)


def test_messages_are_those_of_the_code():
    (table,) = re.findall(r"\| what \| message \|\n.*?\n\n", PAGE, re.DOTALL)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "hf_depthattn" / "distributed").glob("*.py"))
    joined = re.sub(r'"\n\s*f?"', "", source)
    for message in re.findall(r"\| `([a-z_]+: .*?)`", table):
        # The code inserts numbers, names and values.
        for part in re.split(r"\(?\.\.\.\)?|\d+|'\w+'|Schedule\w+|True|False", message.partition(":")[2]):
            assert part.strip(" .,;") in joined, (message, part)


def test_plans_are_for_both_hosts_and_numbers_of_gpus():
    rows = re.findall(r"^\| (Qwen3-32B|Kimi-Linear-48B) \| (.+?) \| ([\d,]+) \|", PAGE, re.MULTILINE)
    assert len(set(rows)) == 8
    assert {gpus for _, _, gpus in rows} == {"64", "1,024"}


def test_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
