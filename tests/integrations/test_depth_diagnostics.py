"""Diagnostics during training: the values of the report's metrics, and no effect on training."""

import copy
import math

import pytest
import torch
from depth_forms import random_model
from tiny_hosts import random_ids, tiny_stock_model
from training_models import rows, training_arguments
from transformers import Trainer, set_seed

from hf_depthattn.eval.metrics.depth_weights import depth_weights
from hf_depthattn.eval.metrics.gradients import gradient_magnitude
from hf_depthattn.eval.metrics.output_magnitude import output_magnitude
from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.metrics.slot_mass import slot_mass
from hf_depthattn.integrations.depth_diagnostics import DepthDiagnosticsCallback, depth_diagnostics

FORMS = {
    "Full AttnRes": {"sublayers_per_block": 1},
    "sigmoid, static mix": {"sublayers_per_block": 2, "static_mix": True, "depth_activation": "sigmoid"},
    "Block AttnRes and MoDA": {"sublayers_per_block": 2, "depth_kv": "attention+mlp", "depth_gate": "head"},
    "residual stream": {"connection": "residual"},
    "MoDA, post-norm": {"connection": "residual", "depth_kv": "attention", "norm_position": "post"},
    "streams": {"connection": "hyper_connections", "stream_mix": "dynamic"},
    "delta": {"connection": "delta"},
}
every_form = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)


@every_form
def test_values_are_those_of_the_metrics(fields):
    """The metrics of the report are another implementation: separate passes through hooks of a probe."""
    model, ids = random_model(**fields), random_ids(3, 11)
    text = TextBatches(ids, batch_size=3)
    found = depth_diagnostics(model, ids)

    expected = {}
    for layer, value in enumerate(output_magnitude(model, text).states[1:].tolist()):
        expected[f"depth/output_magnitude/layer_{layer}"] = value
    for layer, value in enumerate(gradient_magnitude(model, text).layer_parameters.tolist()):
        expected[f"depth/gradient_norm/layer_{layer}"] = value
    if model.config.connection == "delta":
        expected |= delta_weights(model, ids)
    elif model.config.connection == "attn_res":
        weights = depth_weights(model, text)
        for kind, sites in (("attention", range(0, 6, 2)), ("mlp", range(1, 6, 2))):
            means = [weights.means[site][~weights.means[site].isnan()] for site in sites]
            known = [(site, mean) for site, mean in zip(sites, means, strict=True) if len(mean) > 1]
            entropies = [weights.entropies[site].item() for site, _ in known]
            expected[f"depth/weight_entropy/{kind}"] = sum(entropies) / len(known)
            # Weights of a sigmoid do not sum to one, and the diagnostics are their shares.
            if model.config.depth_activation == "softmax":
                expected[f"depth/weight_of_newest/{kind}"] = sum(mean[-1].item() for _, mean in known) / len(known)
                expected[f"depth/weight_of_embedding/{kind}"] = sum(mean[0].item() for _, mean in known) / len(known)
    if model.config.depth_kv is not None:
        totals = slot_mass(model, text).totals.mean(dim=-1)
        expected |= {f"depth/slot_mass/layer_{i}": value for i, value in enumerate(totals.tolist()) if i > 0}
    for key, value in expected.items():
        assert math.isclose(found[key], value, rel_tol=1e-5, abs_tol=1e-7), (key, found[key], value)
    others = found.keys() - expected.keys()
    assert not others or all(key.startswith("depth/weight_") for key in others)


def delta_weights(model, ids) -> dict[str, float]:
    """Weights of the embedding, the softmax written out: sources are null, the embedding, and earlier outputs."""
    records: dict = {}
    hooks = []
    sites = [site for layer in model.model.layers for site in (layer.attn_depth, layer.mlp_depth)]
    for site in sites:
        hooks.append(site.register_forward_pre_hook(lambda site, args: records.update({site: args[0].sources})))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    shares: dict[str, list[float]] = {"attention": [], "mlp": []}
    for site in sites[1:]:
        keys = torch.stack([site.null.expand_as(records[site][0]), *records[site]]).double()
        keys = keys / (keys.square().mean(-1, keepdim=True) + site.eps).sqrt()
        weights = (keys @ (site.query * site.key_norm).double()).softmax(0)
        shares["mlp" if site.site % 2 else "attention"].append(weights[1].mean().item())
    return {f"depth/weight_of_embedding/{kind}": sum(each) / len(each) for kind, each in shares.items()}


def test_groups_are_means_over_consecutive_layers():
    model, ids = random_model(sublayers_per_block=2), random_ids(2, 7)
    single, grouped = depth_diagnostics(model, ids), depth_diagnostics(model, ids, max_groups=2)
    for name in ("output_magnitude", "gradient_norm"):
        first = (single[f"depth/{name}/layer_0"] + single[f"depth/{name}/layer_1"]) / 2
        assert math.isclose(grouped[f"depth/{name}/layers_0-1"], first, rel_tol=1e-6)
        assert grouped[f"depth/{name}/layers_2-2"] == single[f"depth/{name}/layer_2"]


def test_the_model_stays_as_it_is():
    model, ids = random_model(sublayers_per_block=2), random_ids(2, 7)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    depth_diagnostics(model, ids)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.model.layers)


def run(model, data, ids, folder, *, with_callback: bool) -> Trainer:
    set_seed(1)
    args = training_arguments(folder, gradient_accumulation_steps=2)
    trainer = Trainer(copy.deepcopy(model), args, train_dataset=data)
    if with_callback:
        trainer.add_callback(DepthDiagnosticsCallback(trainer.log, ids, every=3))
    trainer.train()
    return trainer


@every_form
def test_training_is_the_same_with_and_without(fields, tmp_path):
    # Dropout, so that a random number drawn by the callback would change what follows.
    model, data = random_model(host_fields={"attention_dropout": 0.2}, **fields), rows()
    ids = random_ids(2, 11)
    without = run(model, data, ids, tmp_path / "without", with_callback=False)
    with_diagnostics = run(model, data, ids, tmp_path / "with", with_callback=True)
    histories = [trainer.state.log_history for trainer in (without, with_diagnostics)]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    for (name, one), other in zip(without.model.named_parameters(), with_diagnostics.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    logged = [entry for entry in with_diagnostics.state.log_history if "depth/gradient_norm/layer_0" in entry]
    # Before training, at step 3, and at the last one.
    assert [entry["step"] for entry in logged] == [0, 3, 4]
    assert logged[0]["depth/gradient_norm/layer_0"] != logged[1]["depth/gradient_norm/layer_0"]


def test_stock_models_and_bad_intervals_are_refused():
    with pytest.raises(ValueError, match="has no depth connections; for a baseline, use connection='residual'"):
        depth_diagnostics(tiny_stock_model("llama"), random_ids(1, 5))
    for field in ("every", "max_groups"):
        with pytest.raises(ValueError, match=f"{field}: 0 must be at least 1"):
            DepthDiagnosticsCallback(print, random_ids(1, 5), **{"every": 1, field: 0})
