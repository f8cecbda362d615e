"""Reports of models that give NaN or infinite values: a finding, and no step after a measurement may lose it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import edit_tensors
from eval_commands import strict_json
from report_checkpoints import SIZES, typed_model

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from hf_depthattn.cli.main import main
from hf_depthattn.eval.metrics.probing.results import DepthMetric
from hf_depthattn.eval.metrics.registry import DEPTH_METRICS
from hf_depthattn.eval.report import drawing
from hf_depthattn.eval.report import run as report_run
from hf_depthattn.eval.report.figure_registry import FIGURES
from hf_depthattn.eval.report.health import health_findings


def spoil(folder: str, key: str, value: float) -> None:
    edit_tensors(Path(folder), lambda tensors: tensors[key].view(-1)[:1].fill_(value))


@pytest.mark.parametrize("full", [(), pytest.param(("--full",), marks=pytest.mark.slow)], ids=["", "full"])
@pytest.mark.parametrize("model", ["stock", "depth"])
@pytest.mark.parametrize(
    ("key", "first"), [("model.layers.1.mlp.down_proj.weight", "layer 1"), ("model.norm.weight", None)]
)
def test_one_nan_weight_is_a_finding(run_report, model, key, first, full):
    spoil(model, key, math.nan)
    code, stdout, stderr, content, page = run_report(model, *full)
    assert code == 0 and content["model"]["failed"] == {} and content["figures_left_out"] == {}
    assert content["model"]["info"]["non_finite_parameters"] == [key]
    assert f"{model}: parameters with NaN or infinite values: {key}." in stderr
    (sentence,) = [line for line in stderr if "the loss on this text is NaN or infinite" in line]
    assert ("so are the states from" in sentence) == (first is not None) and (first or "") in sentence
    text = page.read_text(encoding="utf-8")
    assert "Non-finite values:" in text and key in text
    # No number is made up from what is none.
    rows = dict(line.rsplit("  ", 1) for line in map(str.strip, stdout.splitlines()) if "  " in line)
    rows = {title.strip(): value.strip() for title, value in rows.items()}
    assert rows["loss (nats per token)"] == rows["depth of the prediction"] == "NaN"
    assert rows["usefulness U, sublayers"] == rows["neighbours swapped, inner pairs"] == "NaN"
    metrics = content["model"]["metrics"]
    assert metrics["logit_lens"]["top5_overlap"][-1] is None and metrics["usefulness_sublayer"]["score"] is None


def test_an_overflow_of_float16_is_a_finding(run_report):
    spoil("stock", "model.layers.1.mlp.down_proj.weight", 6e4)
    edit_tensors(Path("stock"), lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e4))
    code, _, stderr, content, _ = run_report("stock", "--dtype", "float16")
    assert code == 0 and content["model"]["info"]["non_finite_parameters"] == []
    assert any("The largest float16 value is 65,504: try bfloat16 or float32." in line for line in stderr)
    assert health_findings(typed_model(run_report("stock", out="wide")[3]["model"])) == []


def test_a_diverged_model_beside_a_good_one(run_report):
    spoil("depth", "model.norm.weight", math.nan)
    code, stdout, _, content, page = run_report("stock", "--compare", "depth")
    assert code == 0 and "NaN" in stdout and page.exists()
    assert (
        health_findings(typed_model(content["model"])) == []
        and len(health_findings(typed_model(content["compare"]))) == 2
    )


def test_a_figure_that_cannot_be_drawn_costs_nothing_else(run_report, monkeypatch):
    def breaks(models):
        raise IndexError("no such panel")

    broken = {
        "causal": replace(FIGURES["causal"], panels=breaks),
        "gradient": replace(FIGURES["gradient"], findings=breaks),
    }
    monkeypatch.setattr(drawing, "FIGURES", {**FIGURES, **broken})
    code, _, stderr, content, page = run_report("stock")
    assert code == 0 and "figure causal is omitted: IndexError: no such panel" in stderr
    assert (
        content["figures_left_out"].keys() == {"causal", "gradient"} and "causal_scores" in content["model"]["metrics"]
    )
    assert "figure gradient (IndexError: no such panel)" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [ValueError, IndexError, KeyError, ZeroDivisionError, torch.linalg.LinAlgError])
def test_a_metric_that_fails_costs_no_other(run_report, monkeypatch, error):
    def fails(probe, text):
        raise error("no such thing")

    line = DEPTH_METRICS["logit_lens"]
    broken = {"logit_lens": DepthMetric(fails, line.num_forwards, line.is_cheap, line.applies)}
    monkeypatch.setattr(report_run, "DEPTH_METRICS", {**DEPTH_METRICS, **broken})
    code, _, stderr, content, _ = run_report("stock")
    assert code == 0 and "no such thing" in content["model"]["failed"]["logit_lens"]
    assert any("logit_lens is omitted" in line for line in stderr)


def test_measured_numbers_are_there_before_anything_is_drawn(run_report, monkeypatch):
    def breaks(*arguments):
        raise MemoryError

    monkeypatch.setattr(report_run, "health_findings", breaks)
    assert main(["report", "stock", "--out", "out", "--text", "text.txt", *SIZES]) == 2
    assert strict_json(Path("out", "report.json"))["model"]["metrics"]
