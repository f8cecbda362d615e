"""The scripts that the Makefile calls, at tiny sizes."""

import json
from pathlib import Path

import pytest
from processes import ROOT, run_python
from tiny_checkpoints import save_stock


def run(*arguments: str, cwd: Path) -> str:
    result = run_python(*arguments, cwd=cwd, python_path=str(ROOT))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_demo_runs_on_a_checkpoint(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("accelerate")
    save_stock(tmp_path / "stock", max_position_embeddings=512)
    output = run(
        str(ROOT / "examples" / "demo.py"),
        *("--model", str(tmp_path / "stock"), "--out", str(tmp_path / "out")),
        *("--steps", "3", "--block-size", "32", "--batch-size", "2"),
        cwd=tmp_path,
    )
    assert "the checkpoints agree" in output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    losses = summary["held_out_loss_nats_per_token"]
    assert losses["control"] < losses["before"]
    assert losses["AttnRes"] < losses["before"]
    for name in ("attn_res/config.json", "attn_res_finetuned/model.safetensors", "depth_weights.png"):
        assert (tmp_path / "out" / name).exists(), name


def test_cpu_benchmark_checks_parity_and_writes_json(tmp_path):
    run(
        str(ROOT / "benchmarks" / "cpu_overhead.py"),
        *("--num-layers", "3", "--hidden-size", "32", "--sequence-length", "16", "--rounds", "2", "--threads", "1"),
        *("--output", str(tmp_path / "result.json")),
        cwd=tmp_path,
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["rows"]) == 6
    assert max(result["parity_relative_error"].values()) < 1e-10


def test_cpu_benchmark_prints_no_speed_when_parity_fails(tmp_path):
    """A read that is off by a hundredth stops it."""
    code = (
        "import runpy, sys; from hf_depthattn import depth_connections as d; read = d.attn_res_read\n"
        "d.attn_res_read = lambda *a, **k: (read(*a, **k)[0] * 1.01, None)\n"
        f"sys.argv = ['x', '--num-layers', '2', '--hidden-size', '32', '--sequence-length', '8', '--rounds', '2']\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'cpu_overhead.py')!r}, run_name='__main__')\n"
    )
    result = run_python("-c", code, cwd=tmp_path, python_path=str(ROOT))
    assert result.returncode != 0
    assert "Parity failed" in result.stderr
    assert "x host" not in result.stdout
