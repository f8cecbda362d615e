"""The demo of `make demo`, at a tiny size."""

import json
import re

import pytest
from processes import run_python
from repository import ROOT


@pytest.mark.slow
def test_demo_retrofits_and_trains_twins(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("accelerate")
    sizes = ("--steps=3", "--block-size=32", "--batch-size=2", "--report-sequences=2")
    result = run_python(str(ROOT / "examples" / "demo.py"), *sizes, cwd=tmp_path, python_path=str(ROOT))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.count("the checkpoints agree") == 1
    out = tmp_path / "demo_output"
    summary = json.loads((out / "summary.json").read_text())
    losses, difference = summary["held_out_loss_nats_per_byte"], summary["difference"]
    assert losses["attn_res"] - losses["residual"] == pytest.approx(difference["mean"])
    assert 0 < difference["standard_error"] < 1 and summary["tokens"] == 3 * 2 * 32
    assert re.search(r"Block AttnRes minus residual stream: [+-]\d\.\d{4} nats per byte", result.stdout)
    for name, seconds in summary["training_seconds"].items():
        log = json.loads((out / name / "log.json").read_text())
        assert [entry["train_runtime"] for entry in log if "train_runtime" in entry] == [seconds], name
        card = (out / name / "model" / "README.md").read_text()
        assert "| initial weights | outputs of sublayers scaled as in GPT-2 |" in card
        # Evaluated once, after training; otherwise, the time of training would include it.
        assert sum("eval_loss" in entry for entry in log) == 1 and not list((out / name / "checkpoints").glob("*"))
    for file in ("retrofit/config.json", "residual/model/model.safetensors", "attn_res/model/README.md"):
        assert (out / file).is_file(), file
    assert (out / "report" / "report.html").is_file() and "report.html" in result.stdout


def test_demo_keeps_foreign_folders(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.txt").write_text("mine")
    result = run_python(str(ROOT / "examples" / "demo.py"), "--out", "mine", cwd=tmp_path, python_path=str(ROOT))
    assert result.returncode == 1 and "mine: exists and is not the output of a demo" in result.stderr
    assert (tmp_path / "mine" / "file.txt").read_text() == "mine"
