"""The demo on a checkpoint (`make demo MODEL=...`), at a tiny size."""

import json
from pathlib import Path

import pytest
from processes import run_python
from repository import ROOT
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
        str(ROOT / "examples" / "demo_retrofit.py"),
        *("--model", str(tmp_path / "stock"), "--out", str(tmp_path / "out")),
        *("--steps", "3", "--block-size", "32", "--batch-size", "2"),
        cwd=tmp_path,
    )
    assert output.count("the checkpoints agree") == 3
    assert "--connection residual --depth-kv attention+mlp --depth-gate head" in output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    losses = summary["held_out_loss_nats_per_token"]
    assert losses.keys() == {"before", "control", "AttnRes", "MoDA", "AttnRes + MoDA"}
    assert all(losses[name] < losses["before"] for name in losses.keys() - {"before"})
    assert summary["minus_control"].keys() == {"AttnRes", "MoDA", "AttnRes + MoDA"}
    assert summary["gates"].keys() == {"MoDA", "AttnRes + MoDA"}
    for gates in summary["gates"].values():
        assert gates["moved"] == gates["number"] == 8 and 0 < gates["mean_absolute"] < gates["largest_absolute"]
        assert len(gates["slot_mass_by_layer"]) == 3 and gates["slot_mass_by_layer"][0] == 0.0
    for name in ("attn_res", "moda", "attn_res_moda"):
        for file in (f"{name}/config.json", f"{name}_finetuned/model.safetensors", "depth_weights.png"):
            assert (tmp_path / "out" / file).exists(), file
    assert (tmp_path / "out" / "report" / "report.html").is_file() and "report.html" in output


@pytest.mark.slow
def test_demo_leaves_moda_out_where_the_host_cannot_have_it(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("accelerate")
    save_stock(tmp_path / "stock", "diffllama", max_position_embeddings=512)
    output = run(
        str(ROOT / "examples" / "demo_retrofit.py"),
        *("--model", str(tmp_path / "stock"), "--out", str(tmp_path / "out")),
        *("--steps", "1", "--block-size", "32", "--batch-size", "2"),
        cwd=tmp_path,
    )
    assert output.count("the checkpoints agree") == 1
    losses = json.loads((tmp_path / "out" / "summary.json").read_text())["held_out_loss_nats_per_token"]
    assert losses.keys() == {"before", "control", "AttnRes"}
