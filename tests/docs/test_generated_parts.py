"""The generated parts of documents are up to date and complete."""

import json
import re

import pytest
from processes import run_python
from repository import ROOT
from tiny_hosts import needs_kimi_linear

from hf_depthattn import supported_hosts
from hf_depthattn.depth_connections import CONNECTIONS
from hf_depthattn.depth_options import DEPTH_OPTIONS


def part(document: str, name: str) -> str:
    """Return the text between the markers of a part, which must be there once."""
    text = (ROOT / document).read_text(encoding="utf-8")
    (content,) = re.findall(f"<!-- {name}:begin -->(.*?)<!-- {name}:end -->", text, re.DOTALL)
    return content


@needs_kimi_linear
def test_generated_parts_are_up_to_date():
    result = run_python("docs/render_documents.py", "--check", cwd=ROOT, python_path=str(ROOT))
    assert result.returncode == 0, result.stderr


def test_every_host_is_listed():
    assert set(re.findall(r"`([\w-]+)`", part("docs/hosts.md", "hosts"))) == set(supported_hosts())


def test_every_option_of_moda_is_listed():
    of_moda = {name for name, option in DEPTH_OPTIONS.items() if option.is_moda}
    assert of_moda <= set(re.findall(r"^\| `(\w+)` \|", part("docs/moda.md", "moda"), re.MULTILINE))


def test_every_connection_is_in_the_reference():
    classes = re.findall(r"\.(\w+)$", part("docs/api_connections.md", "classes"), re.MULTILINE)
    assert classes == [kind.__name__ for kind in CONNECTIONS.values()]


@pytest.mark.parametrize(("name", "result"), [("cpu", "cpu_overhead"), ("memory", "training_memory")])
def test_tables_of_costs_have_every_row_of_the_results(name, result):
    table = part("docs/costs.md", name)
    measured = json.loads((ROOT / "benchmarks" / "results" / f"{result}.json").read_text())
    parts = [measured["parts"][of_part] for of_part in ("decoder", "attention")] if name == "cpu" else [measured]
    for row in (row for of_part in parts for row in of_part["rows"]):
        assert f"| {row['name']} | " in table, row["name"]


def test_the_study_is_in_the_readme():
    assert "![" in part("README.md", "study") and "| scaled Block AttnRes | " in part("README.md", "study")
