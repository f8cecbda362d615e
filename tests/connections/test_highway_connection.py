"""Highway networks: the equation with both gates, the initial gates, and weights that sum to one."""

import math

import pytest
import torch
from connection_cases import D, check_against, random_case
from huggingface_hub.errors import StrictDataclassError
from tiny_hosts import tiny_host_config
from transformers import initialization as init

from hf_depthattn import DepthAttnConfig
from hf_depthattn.depth_connections import depth_site


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_forward_and_every_gradient_equal_the_equation(gate):
    def reference(sites, embedding, sublayers):
        stream = embedding
        for i, sublayer in enumerate(sublayers):
            parameters = dict(sites[i].named_parameters())
            weight, bias = parameters["gate.weight"], parameters["gate.bias"]
            assert weight.shape == ((D, D) if gate == "channel" else (1, D))
            output, mixed = sublayer(stream), []
            for channel in range(D):
                row = channel if gate == "channel" else 0
                score = sum(weight[row, j] * stream[j] for j in range(D)) + bias[row]
                carried = 1 / (1 + score.exp())
                mixed.append(carried * stream[channel] + (1 - carried) * output[channel])
            stream = torch.stack(mixed)
        return stream

    check_against(reference, connection="highway", highway_gate=gate)


@pytest.mark.parametrize("bias, gate", [(-2.0, 1 / (1 + math.exp(2))), (-1, 1 / (1 + math.e))])
def test_initial_gates_are_the_sigmoid_of_the_bias(bias, gate):
    host = tiny_host_config("llama")
    site = depth_site(DepthAttnConfig(text_config=host, connection="highway", highway_bias_init=bias), 3)
    site.init_parameters(init)
    stream, output = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    mixed = site.write(site.begin(stream), output).partial
    torch.testing.assert_close(mixed, (1 - gate) * stream + gate * output)


def test_gates_under_autocast_are_those_of_float32():
    site = random_case("highway").model.layers[1].mlp_depth
    stream, output = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    expected = site.write(site.begin(stream), output).partial
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(site.write(site.begin(stream), output).partial, expected)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"highway_gate": "row"}, "highway_gate: 'row' is not one of 'token', 'channel'"),
        ({"highway_bias_init": math.inf}, "highway_bias_init: inf must be finite"),
    ],
)
def test_bad_options_are_refused_by_name(fields, named):
    with pytest.raises(StrictDataclassError, match=named):
        DepthAttnConfig(text_config=tiny_host_config("llama"), connection="highway", **fields)
