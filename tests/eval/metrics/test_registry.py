"""All depth metrics on models of every family: retrofits against their hosts, traces, dtypes, estimates."""

import json
import math

import pytest
import torch
from depth_metric_models import (
    DEPTH_FAMILIES,
    close,
    random_depth_model,
    traces,
)
from model_checks import depth_model, relative_max_error
from tiny_hosts import random_ids, tiny_stock_model
from torch import nn

from hf_depthattn.eval.metrics.gradients import gradient_magnitude
from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.metrics.registry import DEPTH_METRICS, depth_metrics_of, estimate_seconds


def flat(result):
    """All numbers of a result but its cost."""
    tensors = [value for value in vars(result).values() if isinstance(value, torch.Tensor)]
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_zero_queries_measure_the_host(size):
    """Retrofits of a host have its metrics, in all conventions but that of the layer form, which they do not have."""
    host = tiny_stock_model("llama", num_hidden_layers=4)
    moda = {"depth_kv": "attention", "depth_gate": "head"}
    retrofit = depth_model(host, connection="attn_res", sublayers_per_block=size, read_scale="sum", **moda)
    ids = TextBatches(random_ids(4, 10), batch_size=2)
    names = [name for name in depth_metrics_of(host, full=True) if name != "usefulness_layer"]
    assert set(names) <= set(depth_metrics_of(retrofit, full=True)) and len(names) >= 12
    for name in names:
        expected, actual = (DEPTH_METRICS[name].run(m, ids).to_dict() for m in (host, retrofit))
        for field, value in expected.items():
            if field in ("family", "cost", "sources", "depth_parameters"):
                continue
            if isinstance(value, list) and value and not isinstance(value[0], str | bool):
                a, b = (torch.tensor(json.loads(json.dumps(x).replace("null", "NaN"))) for x in (actual[field], value))
                assert torch.allclose(a, b, rtol=2e-4, atol=2e-5, equal_nan=True), (name, field)
            elif isinstance(value, float):
                assert math.isclose(actual[field], value, rel_tol=2e-4, abs_tol=2e-5), (name, field)
            elif not isinstance(value, dict):
                assert actual[field] == value, (name, field)


@pytest.mark.parametrize("family", ["stock", *DEPTH_FAMILIES])
def test_every_metric_runs_and_leaves_nothing_behind(family):
    model = tiny_stock_model("llama") if family == "stock" else random_depth_model(family)
    model.train()
    text = TextBatches(random_ids(4, 10), batch_size=4)
    before, weights = traces(model), {name: p.clone() for name, p in model.named_parameters()}
    metrics = depth_metrics_of(model, full=True)
    assert set(depth_metrics_of(model)) < set(metrics)
    probe = DepthProbe(model)
    for name, metric in metrics.items():
        result = metric.run(probe, text)
        assert traces(model) == before, name
        document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert document["text"] == {"sha256": text.sha256, "num_tokens": 40, "num_sequences": 4}
        assert document["family"] == probe.family and document["cost"]["seconds"] > 0
        # What the report's time estimate is made of; readouts and observing are no forward passes.
        passes = result.cost.num_forwards + 2 * result.cost.num_backwards
        assert 0.4 <= metric.num_forwards(probe) / passes <= 2.5 or passes <= 3, (name, passes)
        for key, value in vars(result).items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == torch.float64 and value.device.type == "cpu", (name, key)
                assert not value.isinf().any(), (name, key)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "gpt2", "gpt_neox", "mamba2", "granite", "phi3"])
def test_stock_models_of_other_families_have_every_metric(model_type):
    mamba = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8}
    model = tiny_stock_model(model_type, **(mamba if model_type == "mamba2" else {}))
    text, before = TextBatches(random_ids(4, 9), batch_size=4), traces(model)
    metrics = depth_metrics_of(model, full=True)
    assert {"usefulness_layer", "usefulness_sublayer", "causal_scores_sublayer", "jacobian_gap"} <= set(metrics)
    for name, metric in metrics.items():
        result = metric.run(model, text)
        assert not flat(result).isinf().any() and flat(result).isfinite().any(), name
    assert traces(model) == before
    # A sublayer with multiplier: the gradient by its output is the one by the stream behind it.
    states = []

    def keep(index, state):
        state.retain_grad()
        states.append(state)

    probe = DepthProbe(model)
    with probe.observe_states(keep):
        logits = probe.logits(text.ids)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), text.ids[:, 1:].flatten()).backward()
    last = gradient_magnitude(model, text).sublayer_outputs[-1]
    assert close(last, states[-1].grad.double().norm(), 1e-4)


def test_time_estimates_cover_the_metrics_of_a_model(model):
    text = TextBatches(random_ids(6, 10), batch_size=2)
    few, all_of_them = (estimate_seconds(model, text, full=full) for full in (False, True))
    assert set(few) == set(depth_metrics_of(model)) < set(all_of_them)
    assert all_of_them["permutation_all"] > 2 * all_of_them["output_variance"] > 0


def test_a_broken_model_leaves_nothing_behind(model):
    broken = tiny_stock_model("llama").train()
    broken.model.layers[2].mlp.forward = lambda x: x[..., :3]
    before = traces(broken)
    for name, metric in depth_metrics_of(broken, full=True).items():
        with pytest.raises(RuntimeError):
            metric.run(broken, random_ids(4, 6))
        assert traces(broken) == before, name


@pytest.mark.parametrize("family", ["stock", "block+moda"])
def test_bfloat16_models_are_measured_in_wider_numbers(family):
    model = tiny_stock_model("llama") if family == "stock" else random_depth_model(family)
    text = TextBatches(random_ids(4, 12), batch_size=2)
    wide = {name: metric.run(model, text) for name, metric in depth_metrics_of(model).items()}
    model.to(torch.bfloat16)
    fields = {
        "output_variance": "states",
        "angular_distance": "distances",
        "logit_lens": "kl",
        "causal_scores": "scores",
    }
    for name, field in fields.items():
        actual, expected = (getattr(x, field).nan_to_num() for x in (DEPTH_METRICS[name].run(model, text), wide[name]))
        assert relative_max_error(actual, expected) <= 0.05, name
    for name in wide:
        assert flat(DEPTH_METRICS[name].run(model, text)).isfinite().any(), name
