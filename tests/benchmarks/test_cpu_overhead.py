"""The CPU benchmark at tiny sizes: it checks parity first, and writes what the README's table is made from."""

import json

import pytest
from benchmark_runs import BENCHMARKS, BREAKS, run_benchmark
from processes import run_python
from repository import ROOT

TINY_CPU = (
    *("--num-layers", "3", "--hidden-size", "32", "--sequence-length", "16", "--rounds", "2", "--threads", "1"),
    *("--attention-sequence-length", "21", "--num-slots", "3"),
)


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
