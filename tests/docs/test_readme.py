"""README.md: its generated parts are up to date, and its quick start runs."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from processes import run_python
from repository import ROOT

from hf_depthattn import retrofit, supported_hosts
from hf_depthattn.depth_options import DEPTH_OPTIONS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_parts_are_up_to_date():
    result = run_python("docs/render_documents.py", "--check", cwd=ROOT, python_path=str(ROOT))
    assert result.returncode == 0, result.stderr
    table = re.search(r"<!-- hosts:begin -->(.*?)<!-- hosts:end -->", README, re.DOTALL)
    assert set(re.findall(r"`([\w-]+)`", table[1])) == set(supported_hosts())
    table = re.search(r"<!-- moda:begin -->(.*?)<!-- moda:end -->", README, re.DOTALL)
    of_moda = {name for name, option in DEPTH_OPTIONS.items() if option.is_moda}
    assert of_moda <= set(re.findall(r"^\| `(\w+)` \|", table[1], re.MULTILINE))


@pytest.mark.parametrize(("part", "result"), [("cpu", "cpu_overhead"), ("memory", "training_memory")])
def test_tables_of_costs_have_every_row_of_the_results(part, result):
    (table,) = re.findall(f"<!-- {part}:begin -->(.*?)<!-- {part}:end -->", README, re.DOTALL)
    measured = json.loads((ROOT / "benchmarks" / "results" / f"{result}.json").read_text())
    parts = [measured["parts"][name] for name in ("decoder", "attention")] if part == "cpu" else [measured]
    for row in (row for of_part in parts for row in of_part["rows"]):
        assert f"| {row['name']} | " in table, row["name"]


def test_quick_start_runs_as_written(tmp_path):
    from_scratch, from_checkpoint = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]
    assert all(len(code.splitlines()) <= 15 for code in (from_scratch, from_checkpoint))
    code = from_scratch + from_checkpoint
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    result = run_python("-c", code, cwd=tmp_path, python_path=str(ROOT))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "def add" in result.stdout


def test_links_and_paths_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    assert (ROOT / "examples" / "demo_model" / "checkpoint" / "model.safetensors").stat().st_size <= 2_000_000


def test_committed_model_card_is_what_retrofit_writes(tmp_path):
    retrofit(ROOT / "examples" / "demo_model" / "checkpoint", tmp_path / "demo-attn-res", num_blocks=8)
    card = (tmp_path / "demo-attn-res" / "README.md").read_text(encoding="utf-8")
    assert card == (ROOT / "model_cards" / "demo-attn-res.md").read_text(encoding="utf-8")
    data = ModelCard(card).data.to_dict()
    assert data["library_name"] == "transformers"
    assert "custom_code" in data["tags"]
    assert "[More Information Needed]" not in card
