"""The GPU suite on a CPU: tiny shapes, torch's ops."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from gpu_suite_tools import FakeGraph, dry_run, module, rows_of, stand_in_gpu

FEW_CASES = ("read L=9 d=7168", "decode read L=9 d=4096 1 token", "Block", "T=4096 G=8 L=64 d=64")
SPEEDS = ("median", "passes")


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> tuple[dict, Path]:
    """A dry run of all parts, with two of the whole models."""
    output = tmp_path_factory.mktemp("suite") / "result.json"
    end_to_end = module("gpu_end_to_end")
    variants = dict(end_to_end.VARIANTS)
    with pytest.MonkeyPatch.context() as patch:
        kept = {name: variants[name] for name in (end_to_end.STOCK, "Block AttnRes, N=8")}
        patch.setattr(end_to_end, "VARIANTS", kept)
        code, result = dry_run("--no-compile", "--only", *FEW_CASES, output=output)
    assert code == 0
    return result, output


# --- the result ---


def test_dry_run_measures_every_part_and_says_that_it_is_one(complete):
    result, output = complete
    assert result["dry_run"] and result["complete"]
    names = [case["name"] for case in result["cases"]]
    assert all(any(text in name for name in names) for text in FEW_CASES)
    assert {"torch", "triton", "transformers"} <= set(result["environment"]["versions"])
    for case in result["cases"]:
        assert case["setting"] and set(case["floors"]) == {"forward", "forward+backward"}
        # A peer that is installed has Triton kernels, which want a GPU.
        rows = [row for row in case["rows"] if "0 active drivers" not in row.get("reason", "")]
        statuses = {row["name"]: row["status"] for row in rows}
        assert "ok" in statuses.values() and set(statuses.values()) <= {"ok", "absent"}, statuses
        for row in rows:
            if row["status"] == "absent":
                assert row["reason"] and "passes" not in row
                continue
            for found in row["passes"].values():
                assert found["median_s"] > 0 and len(found["quartiles_s"]) == 2 and found["num_runs"] == 2
            if row["kind"] == "ours":
                assert row["parity"]["ok"] and row["parity"]["by_dtype"][0]["dtype"] == "bfloat16"
    for row in result["end_to_end"]["rows"]:
        assert {name: step["status"] for name, step in row["steps"].items()} == {
            "training step": "ok",
            "decode step": "ok",
        }
        assert all(step["tokens_per_s"] > 0 for step in row["steps"].values())
    assert all(target["status"] == "not judged: dry run" for target in result["targets"])
    assert all(target["measured"] is None for target in result["targets"])
    text = output.with_suffix(".md").read_text()
    assert "not measurements" in text and "met" not in {cell.strip() for cell in text.split("|")}
    assert "TB/s" not in text


def test_missing_peers_are_listed_with_the_error_of_their_import(complete):
    rows = rows_of(complete[0], "read L=9 d=7168")
    for name, package in (("FLA fused_attnres", "fla"), ("Liger liger_attn_res", "liger_kernel")):
        if importlib.util.find_spec(package) is None:
            assert rows[name]["status"] == "absent" and f"No module named '{package}'" in rows[name]["reason"]


def test_table_is_rendered_from_the_json_alone(complete, capsys):
    _, output = complete
    assert module("gpu_suite").main(["--render", str(output)]) == 0
    assert capsys.readouterr().out == output.with_suffix(".md").read_text()


def test_targets_are_judged_on_a_gpu_only(complete):
    report = module("gpu_report")
    result = copy.deepcopy(complete[0])
    result["dry_run"], result["environment"]["device"] = False, "NVIDIA H200"
    result["copy_bytes_per_s"] = 4e12
    for case in result["cases"]:
        for row in case["rows"]:
            for found in row.get("passes", {}).values():
                found["median_s"] = {"ours": 1e-4, "peer": 1e-3}.get(row["kind"], 8e-5)
    report.derive(result)
    status = {target["target"]: target["status"] for target in result["targets"]}
    assert status["read at L=9 d=7168 8192 tokens: at most 320 us"] == "met"
    assert status["Block: at least 2 x the best peer"] == "met"
    assert status["MoDA T=4096: at least 70% of the fastest vendor attention"] == "met"
    assert status["MoDA T=16384: at least 2 x the official kernel"] == "not measured"
    block = next(case for case in result["cases"] if case["name"].startswith("Block"))
    found = block["rows"][0]["passes"]["forward"]
    assert found["bytes_per_s"] == pytest.approx(block["floors"]["forward"]["bytes"] / 1e-4)
    assert found["floor_s"] == pytest.approx(block["floors"]["forward"]["bytes"] / 4e12)
    moda = next(case for case in result["cases"] if case["name"].startswith("MoDA"))
    rows = {row["name"]: row for row in moda["rows"]}
    # Of what the slots cost on top of the vendor's attention.
    floor = moda["floors"]["forward"]["bytes"]
    assert rows["ours"]["passes"]["forward"]["bytes_per_s"] == pytest.approx(floor / 2e-5)
    assert "bytes_per_s" not in rows["vendor attention alone, flash"]["passes"]["forward"]
    for row in block["rows"]:
        if row["kind"] == "ours" and row["status"] == "ok":
            row["passes"]["forward+backward"]["median_s"] = 1.0
    result["environment"]["device"] = "NVIDIA A100"
    report.derive(result)
    status = {target["target"]: target["status"] for target in result["targets"]}
    text = "Block, forward and backward: at most 35 ms"
    assert status[text].startswith("missed, on another device")
    assert "| missed, on another device" in report.markdown(result)


def test_floors_are_those_of_the_study():
    attn_res = module("gpu_attn_res")
    unit = 2 * 4096 * 16384
    forward, both = (size for size, _ in attn_res.stack_floors(64, 8, unit).values())
    # The study's 12.7 and 16.7 ms are at 4.3 TB/s, with fewer bytes for the first block.
    assert forward / 4.3e12 == pytest.approx(12.7e-3, rel=0.06)
    assert (both - forward) / 4.3e12 == pytest.approx(16.7e-3, rel=0.06)
    forward, both = (size for size, _ in attn_res.stack_floors(48, 1, 2 * 2048 * 16384).values())
    assert forward / 4.3e12 == pytest.approx(6.9e-3, rel=0.07)
    assert (both - forward) / 4.3e12 == pytest.approx(16.6e-3, rel=0.07)
    moda = {case.name: case for case in module("gpu_moda").cases(tiny=False)}
    case = moda["MoDA T=16384 G=8 L=64 d=64"]
    assert case.floors["forward"][0] == 16384 * 8 * 64 * 2 * (128 + 24)


# --- what goes wrong ---


def test_wrong_results_have_no_speed(tmp_path, monkeypatch):
    attn_res, suite = module("gpu_attn_res"), module("gpu_suite")
    read = attn_res.attn_res_read
    monkeypatch.setattr(attn_res, "attn_res_read", lambda *a, **k: (read(*a, **k)[0] * 1.02, None))
    code, result = dry_run("--only", "read L=9 d=4096", "--parts", "attn_res", output=tmp_path / "r.json")
    assert code == 1
    row = rows_of(result, "read L=9 d=4096 16K")["ours, read and torch's norm"]
    assert row["status"] == "wrong" and row["parity"]["ok"] is False
    assert not any(text in key for key in row for text in SPEEDS)
    assert f"| {row['name']} | wrong: parity failed" in (tmp_path / "r.md").read_text()
    forbidden = suite.forbidden_variants(result["parity"], attn_res.cases(tiny=True))
    assert set(forbidden) == {"Block AttnRes, N=8", "Full AttnRes", "Block AttnRes, N=8, and MoDA"}


def test_whole_model_without_parity_of_an_op_has_no_speed(monkeypatch):
    end_to_end, timing = module("gpu_end_to_end"), module("gpu_timing")
    monkeypatch.setattr(end_to_end, "VARIANTS", {"Block AttnRes, N=8": {"num_blocks": 8}})
    monkeypatch.setattr(end_to_end, "model_parity", lambda *_: {"ok": False})
    rows = []
    clock = timing.Clock(torch.device("cpu"))
    end_to_end.measure(clock, lambda: 100.0, True, {}, rows.append, compiled=False)
    assert [step["status"] for row in rows for step in row["steps"].values()] == ["wrong", "wrong"]


def test_failing_device_keeps_what_is_complete(tmp_path, monkeypatch):
    timing = module("gpu_timing")

    def fail(self):
        raise RuntimeError("an illegal memory access was encountered")

    run_times = module("gpu_run").run_times

    def and_then_fail(*arguments):
        rows = run_times(*arguments)
        monkeypatch.setattr(timing.Clock, "synchronize", fail)
        return rows

    monkeypatch.setattr(module("gpu_run"), "run_times", and_then_fail)
    code, result = dry_run("--only", "decode read", "--parts", "attn_res", output=tmp_path / "r.json")
    assert code == 1 and result["complete"] is False and "illegal memory access" in result["stopped"]
    assert len(result["cases"]) == 1 and "Not complete" in (tmp_path / "r.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md"]


def test_without_time_everything_is_listed_as_left_out(tmp_path):
    arguments = ("--only", "decode read", "--budget-seconds", "0", "--parts", "attn_res")
    code, result = dry_run(*arguments, output=tmp_path / "r.json")
    assert code == 0 and result["complete"]
    assert {row["status"] for case in result["cases"] for row in case["rows"]} == {"no time"}


def test_slow_row_is_stopped():
    timing, run = module("gpu_timing"), module("gpu_run")
    started = time.monotonic()
    found = run.guarded(lambda: {"never": time.sleep(20)}, 0.2)
    assert found == {"status": "no time", "reason": "stopped after 0 s"} and time.monotonic() - started < 5
    budget = timing.Budget(100.0, {"first": 1.0, "second": 3.0})
    budget.begin("first")
    assert budget.left() == pytest.approx(25.0, abs=1)
    budget.begin("second")
    assert budget.left() == pytest.approx(100.0, abs=1)


def test_warm_up_starts_every_row_once_and_leaves_no_process(monkeypatch):
    suite, cases = module("gpu_suite"), module("gpu_attn_res").cases(tiny=True)
    started = []

    class Process(subprocess.Popen):
        def __init__(self, command, **options):
            started.append(self)
            self.arguments = command[2:]
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr(suite.subprocess, "Popen", Process)
    monkeypatch.setattr(suite.os, "cpu_count", lambda: 99)
    arguments = types.SimpleNamespace(parts=["attn_res"])
    with pytest.raises(suite.gpu_run.OutOfTime), suite.gpu_run.time_limit(1.0):
        suite.warm_up(suite._one_per_kernel(cases)[:1], arguments)
    assert [process.arguments[-1] for process in started] == [row.name for row in cases[0].rows[:-1]]
    assert all(process.wait() != 0 for process in started)


@pytest.fixture
def fake_gpu(monkeypatch):
    return stand_in_gpu(monkeypatch)


def test_clock_of_a_gpu_uses_events_and_counts_memory(fake_gpu):
    timing = module("gpu_timing")
    clock, calls = timing.Clock(fake_gpu), []
    found = clock.measure(lambda: calls.append(1), timing.Effort(3, 7, 10.0))
    assert found == {"median_s": 0.002, "quartiles_s": [0.002, 0.002], "num_runs": 7, "peak_bytes": 250}
    assert len(calls) == 9
    assert clock.copy_bandwidth(64) == pytest.approx(2 * 64 / 0.002)
    found = timing.environment(fake_gpu)
    assert found["device"] == "NVIDIA H200" and found["num_multiprocessors"] == 132


def test_graph_is_replayed_and_a_step_that_cannot_be_one_runs_as_it_is(fake_gpu, monkeypatch):
    timing = module("gpu_timing")
    replay = timing.captured(lambda: None, fake_gpu)
    replay()
    assert FakeGraph.replayed == 1
    calls = []

    def refuses():
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    assert timing.captured(refuses, fake_gpu) is None


def test_cpu_is_for_dry_runs_only(capsys):
    with pytest.raises(SystemExit):
        module("gpu_suite").main(["--device", "cpu"])
    assert "--device cpu runs with --dry-run only" in capsys.readouterr().err


def test_help_has_a_command_per_line():
    lines = module("gpu_suite").__doc__.splitlines()
    commands = [line for line in lines if "gpu_suite.py" in line]
    assert len(commands) == 3 and all(line.startswith("    python benchmarks/gpu_suite.py --") for line in commands)
