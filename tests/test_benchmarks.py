"""The benchmarks at tiny sizes: they check parity first, and write what the README's tables are made from."""

import json
import os

import pytest
from processes import run_python
from repository import ROOT

BENCHMARKS = ROOT / "benchmarks"
TINY_CPU = (
    *("--num-layers", "3", "--hidden-size", "32", "--sequence-length", "16", "--rounds", "2", "--threads", "1"),
    *("--attention-sequence-length", "21", "--num-slots", "3"),
)
MEMORY_RESULT = BENCHMARKS / "results" / "training_memory.json"

# What makes one op wrong by a little, before a benchmark is run.
BREAKS = {
    "attn_res_read": """
from hf_depthattn import attn_res_connection as module
read = module.attn_res_read_tapped
module.attn_res_read_tapped = lambda *a, **k: (read(*a, **k)[0] * 1.0001, None)
""",
    "moda_attention in the model": """
from hf_depthattn import moda_attention as module
attention = module.moda_attention
module.moda_attention = lambda *a, **k: (attention(*a, **k)[0] * 1.0001, None)
""",
    # The output stays right: gradients through the log-sum-exp of the slots are lost.
    "gradient of moda_attention": """
from hf_depthattn import moda_attention_ops as module
attention = module.moda_attention
def detached(inputs, **options):
    return attention(inputs._replace(depth_keys=[slot.detach() for slot in inputs.depth_keys]), **options)
module.moda_attention = detached
""",
}


def run_benchmark(name: str, *arguments: str, cwd, broken: str = ""):
    code = f"import sys; sys.argv = [{name!r}, *{arguments!r}]{broken}\nimport {name}; {name}.main()"
    return run_python("-c", code, cwd=cwd, python_path=os.pathsep.join((str(ROOT), str(BENCHMARKS))))


def test_cpu_benchmark_checks_parity_and_writes_json(tmp_path):
    result = run_python(
        str(BENCHMARKS / "cpu_overhead.py"), *TINY_CPU, "--output", "result.json", cwd=tmp_path, python_path=str(ROOT)
    )
    assert result.returncode == 0, result.stderr[-2000:]
    written = json.loads((tmp_path / "result.json").read_text())
    names = [row["name"] for row in written["rows"]]
    assert names[0] == "residual host (stock)"
    assert set(written["parity_relative_error"]) == {name for name in names[1:] if "plain" not in name}
    attention = written["attention"]
    assert set(attention["parity_relative_error"]) == {row["name"] for row in attention["rows"][1:]}
    for part in (written, attention):
        assert max(part["parity_relative_error"].values()) < 1e-10
        assert all(row["ratio_median"] > 0 and len(row["ratio_quartiles"]) == 2 for row in part["rows"])
        assert part["rows"][0]["ratio_median"] == 1
    assert {"MoDA, attention", "MoDA, attention and MLP", "Block AttnRes and MoDA"} <= set(names)


@pytest.mark.parametrize("broken", BREAKS.values(), ids=BREAKS.keys())
def test_cpu_benchmark_prints_no_speed_when_parity_fails(broken, tmp_path):
    result = run_benchmark("cpu_overhead", *TINY_CPU, "--output", "result.json", cwd=tmp_path, broken=broken)
    assert result.returncode != 0
    assert "Parity failed" in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "result.json").exists()


def test_memory_benchmark_gives_the_committed_bytes(tmp_path):
    arguments = ("--num-layers", "8", "--output", "result.json")
    result = run_python(str(BENCHMARKS / "training_memory.py"), *arguments, cwd=tmp_path, python_path=str(ROOT))
    assert result.returncode == 0, result.stderr[-2000:]
    written, committed = (json.loads(path.read_text()) for path in (tmp_path / "result.json", MEMORY_RESULT))
    assert max(written["parity_relative_error"].values()) < 1e-10
    if written["versions"] != committed["versions"]:
        pytest.skip(f"the committed bytes are of {committed['versions']}")
    assert {row["name"]: row["bytes"][0] for row in written["rows"]} == {
        row["name"]: row["bytes"][0] for row in committed["rows"]
    }


def test_memory_benchmark_prints_nothing_when_parity_fails(tmp_path):
    broken = BREAKS["moda_attention in the model"]
    result = run_benchmark("training_memory", "--num-layers", "4", cwd=tmp_path, broken=broken)
    assert result.returncode != 0
    assert "Parity failed" in result.stderr
    assert result.stdout == ""


def test_committed_memory_is_linear_for_ours_and_quadratic_for_the_naive_forms():
    written = json.loads(MEMORY_RESULT.read_text())
    assert written["setting"]["num_layers"] == [8, 16, 32]
    per_layer = {row["name"]: row["bytes_per_layer"] for row in written["rows"]}
    for name in ("stock host", "MoDA", "Block AttnRes and MoDA"):
        assert max(per_layer[name]) < 1.02 * min(per_layer[name]), name
    for name in ("MoDA, slots gathered in every layer", "MoDA, naive"):
        extra = [count - ours for count, ours in zip(per_layer[name], per_layer["MoDA"], strict=True)]
        assert extra[1] > 1.5 * extra[0], name
        assert extra[2] - extra[1] == pytest.approx(2 * (extra[1] - extra[0]), rel=0.05), name
