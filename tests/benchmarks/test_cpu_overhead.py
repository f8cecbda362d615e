"""The CPU benchmark at tiny sizes: it checks parity first, and writes what the README's table is made from."""

import json

import pytest
from benchmark_runs import BENCHMARKS, BREAKS, run_benchmark
from processes import run_python
from repository import ROOT

TINY_CPU = (
    *("--num-layers", "3", "--hidden-size", "128", "--sequence-length", "16", "--rounds", "2", "--threads", "1"),
    *("--attention-sequence-length", "21", "--num-slots", "3"),
)
DEPTHS = [f"depth_{num_layers}" for num_layers in (8, 16, 32, 64)]
AT_EVERY_SIZE = {"Block AttnRes, 8 blocks", "Full AttnRes"}


@pytest.mark.slow
def test_cpu_benchmark_checks_parity_and_writes_json(tmp_path):
    result = run_python(
        str(BENCHMARKS / "cpu_overhead.py"), *TINY_CPU, "--output", "result.json", cwd=tmp_path, python_path=str(ROOT)
    )
    assert result.returncode == 0, result.stderr[-2000:]
    parts = json.loads((tmp_path / "result.json").read_text())["parts"]
    assert parts.keys() == {"attention", "decoder", "bfloat16", "checkpointed", "wide", "narrow", *DEPTHS}
    for name, part in parts.items():
        names = [row["name"] for row in part["rows"]]
        if name != "attention":
            assert names[0] == "residual host (stock)"
        assert set(part["parity_relative_error"]) == {row for row in names[1:] if "pseudo-code" not in row}
        assert max(part["parity_relative_error"].values()) < 1e-10
        assert all(row["ratio_median"] > 0 and len(row["ratio_quartiles"]) == 2 for row in part["rows"])
        assert part["rows"][0]["ratio_median"] == part["rows"][0]["cpu_ratio_median"] == 1
        assert {f"{row}, single reads" for row in AT_EVERY_SIZE} | AT_EVERY_SIZE <= set(names) or name == "attention"
    in_decoder = {row["name"] for row in parts["decoder"]["rows"]}
    assert {"MoDA, attention", "MoDA, attention and MLP", "Block AttnRes and MoDA"} <= in_decoder
    assert [parts[name]["setting"]["num_layers"] for name in DEPTHS] == [8, 16, 32, 64]


@pytest.mark.slow
def test_cpu_benchmark_adds_parts_to_a_result(tmp_path):
    for part in ("attention", "narrow"):
        result = run_python(
            *(str(BENCHMARKS / "cpu_overhead.py"), *TINY_CPU, "--output", "result.json", "--parts", part),
            cwd=tmp_path,
            python_path=str(ROOT),
        )
        assert result.returncode == 0, result.stderr[-2000:]
    assert list(json.loads((tmp_path / "result.json").read_text())["parts"]) == ["attention", "narrow"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


# Each takes a process of its own.
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(code, id=name, marks=[pytest.mark.slow] if i else [])
        for i, (name, code) in enumerate(BREAKS.items())
    ],
)
def test_cpu_benchmark_prints_no_speed_when_parity_fails(broken, tmp_path):
    part = "attention" if broken == BREAKS["gradient of moda_attention"] else "decoder"
    arguments = (*TINY_CPU, "--output", "result.json", "--parts", part)
    result = run_benchmark("cpu_overhead", *arguments, cwd=tmp_path, broken=broken)
    assert result.returncode != 0
    assert "Parity failed" in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "result.json").exists()
