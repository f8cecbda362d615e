"""`output_variance` against a direct computation on a tiny llama."""

from depth_metric_models import (
    close,
)

from hf_depthattn.eval.metrics.output_variance import output_variance


def test_output_variance(model, text, states, sublayers):
    result = output_variance(model, text)
    assert close(result.states, [x.var(-1).mean() for x in states])
    assert close(result.sublayers, [y.var(-1).mean() for _, y in sublayers])
