"""`output_magnitude` against a direct computation on a tiny llama."""

import torch
from depth_metric_models import (
    close,
    random_depth_model,
)
from tiny_hosts import random_ids

from hf_depthattn.eval.metrics.output_magnitude import output_magnitude
from hf_depthattn.eval.metrics.probing.text import TextBatches


def test_output_magnitude(model, text, states, sublayers):
    result = output_magnitude(model, text)
    assert close(result.states, [x.square().mean(-1).sqrt().mean() for x in states])
    assert close(result.sublayers, [y.square().mean(-1).sqrt().mean() for _, y in sublayers])
    assert result.sources is None


def test_magnitude_of_sources_is_that_of_block_sums():
    model, ids = random_depth_model("block"), random_ids(3, 7)
    seen = []
    site = model.get_decoder().layers[-1].out_depth
    with torch.no_grad(), site.register_forward_pre_hook(lambda site, args: seen.append(args[0])):
        model(ids)
    sources = torch.stack([*seen[0].sources, seen[0].open_block]).double()
    result = output_magnitude(model, TextBatches(ids, batch_size=2))
    assert close(result.sources, sources.square().mean(-1).sqrt().mean((1, 2)))
