"""The images of a report."""

from __future__ import annotations

import json

import pytest
from depth_metric_models import EVERY_CONNECTION, connection_model
from tiny_hosts import random_ids

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.metrics.registry import depth_metrics_of
from hf_depthattn.eval.report import drawing
from hf_depthattn.eval.report.result import MeasuredModel, MeasureSettings
from hf_depthattn.eval.report.subject import describe


@pytest.mark.parametrize("connection", EVERY_CONNECTION)
def test_every_metric_and_figure_of_every_connection(connection):
    probe, text = DepthProbe(connection_model(connection, num_layers=2)), TextBatches(random_ids(2, 6), batch_size=2)
    metrics = {
        name: json.loads(json.dumps(metric.run(probe, text).to_dict(), allow_nan=False))
        for name, metric in depth_metrics_of(probe, full=True).items()
    }
    settings = MeasureSettings("", None, None, "", text.sha256, 2, 6, 2, "float32", "cpu", {})
    info = describe(probe)
    assert info.family == connection and not info.non_finite_parameters
    model = MeasuredModel(
        name="tiny", source="", peft=None, info=info, settings=settings, seeds={}, costs={}, failed={}, metrics=metrics
    )
    figures, left_out = drawing.draw_figures([model])
    assert left_out == {} and {"depth_mixing", "causal", "logit_lens", "jacobian"} <= {f.name for f in figures}
    assert all(figure.findings for figure in figures if figure.name == "depth_mixing")


def test_images_of_others_stay(tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("mine.png", "causal.png", "notes.txt"):
        (folder / name).write_text("x")
    drawing.save_images([], folder)
    assert sorted(file.name for file in folder.iterdir()) == ["mine.png", "notes.txt"]
