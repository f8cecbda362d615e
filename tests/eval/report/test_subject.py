"""Names of the models of a report."""

from __future__ import annotations

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from model_checks import depth_model
from tiny_hosts import tiny_stock_model

from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.report.subject import describe, short_names


def test_short_names_tell_models_apart():
    assert short_names(["/a/stories/hf"]) == ["hf"]
    assert short_names(["/a/stories/hf", "/b/other"]) == ["hf", "other"]
    assert short_names(["/a/one/hf", "/a/two/hf"]) == ["one/hf", "two/hf"]
    assert short_names(["x/m", "x/m"]) == ["m (1)", "m (2)"]
    assert short_names(["/x/m", "/x/m"]) == ["m (1)", "m (2)"]
    assert short_names(["/m", "m"]) == ["/m", "m"]


def test_the_current_folder_has_a_name(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert short_names(["."]) == ["model"] and short_names([".", "../model/"]) == ["model (1)", "model (2)"]


@pytest.mark.parametrize(
    "fields, shown",
    [
        ({"sublayers_per_block": 2}, {"block_size_sublayers": 2, "read_scale": "mean"}),
        ({"connection": "mhc"}, {"num_streams": 4, "sinkhorn_iters": 20}),
        ({"connection": "residual", "depth_kv": "attention"}, {"depth_kv": "attention"}),
    ],
)
def test_a_model_is_described_by_the_options_of_its_connection(fields, shown):
    described = describe(DepthProbe(depth_model(tiny_stock_model("llama"), **fields))).depth_attention
    assert shown.items() <= described.items() and described["connection"] == fields.get("connection", "attn_res")
    assert ("block_size_sublayers" in described) == ("connection" not in fields)
