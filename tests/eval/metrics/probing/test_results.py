"""What all metrics share: what they take, and errors for wrong arguments."""

import pytest
from depth_metric_models import (
    close,
)
from tiny_hosts import VOCAB_SIZE, random_ids

from hf_depthattn.eval.metrics.angular_distance import angular_distance
from hf_depthattn.eval.metrics.block_influence import block_influence
from hf_depthattn.eval.metrics.causal import causal_scores
from hf_depthattn.eval.metrics.jacobian import jacobian_gap
from hf_depthattn.eval.metrics.logit_lens import logit_lens
from hf_depthattn.eval.metrics.permutation import permutation_scores
from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.metrics.usefulness import usefulness


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: usefulness(model, ids, level="block"),
        lambda model, ids: usefulness(model, ids[:1]),
        lambda model, ids: causal_scores(model, ids, level="block"),
        lambda model, ids: permutation_scores(model, ids, pairs="some"),
        lambda model, ids: angular_distance(model, ids, tokens="first"),
        lambda model, ids: jacobian_gap(model, ids, num_probes=0),
        lambda model, ids: logit_lens(model, []),
        lambda model, ids: logit_lens(model, ids[0]),
    ],
    ids=["level", "halves", "causal level", "pairs", "tokens", "probes", "empty", "one-dimensional"],
)
def test_wrong_arguments_are_named(model, call):
    with pytest.raises(ValueError, match=r"is not one of|must be at least|got|needs|give at least|no two halves"):
        call(model, random_ids(2, 6))


def test_metrics_accept_models_probes_and_batches(model):
    ids = random_ids(4, 6)
    results = [
        block_influence(model, ids),
        block_influence(DepthProbe(model), [ids[:2], ids[2:]]),
        block_influence(model, TextBatches(ids, batch_size=3)),
    ]
    assert all(close(result.scores, results[0].scores) for result in results)
    assert len({result.text.sha256 for result in results}) == 1
    assert [result.cost.num_forwards for result in results] == [1, 2, 2]
    assert ids.max() < VOCAB_SIZE
