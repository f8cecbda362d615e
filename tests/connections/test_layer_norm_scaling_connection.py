"""LayerNorm Scaling: the equation, a stock host with scaled norms, slots of the scaled input, refused hosts."""

import pytest
import torch
from connection_cases import check_against, random_case
from huggingface_hub.errors import StrictDataclassError
from model_checks import depth_model, relative_max_error
from tiny_hosts import random_ids, tiny_host_config, tiny_stock_model

from hf_depthattn import DepthAttnConfig

HOSTS = ["llama", "mixtral", "gemma2", "granite"]


def test_forward_and_every_gradient_equal_the_equation():
    def reference(sites, embedding, sublayers):
        stream = embedding
        for layer in range(len(sublayers) // 2):
            for sublayer in sublayers[2 * layer : 2 * layer + 2]:
                stream = stream + sublayer(stream / (layer + 1) ** 0.5)
        return stream

    check_against(reference, connection="layer_norm_scaling")


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_with_scaled_norms_computes_the_same(host):
    """The weights of a norm take the scale: `w / sqrt(l)`, or for a norm with `1 + w`, `(1 + w) / sqrt(l) - 1`."""
    torch.manual_seed(0)
    stock, ids = tiny_stock_model(host, torch.float64), random_ids(2, 9)
    model = depth_model(stock, connection="layer_norm_scaling")
    offset = 1.0 if host == "gemma2" else 0.0
    before = stock(ids).logits
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for sublayer in (layer.layout.attention, layer.layout.mlp):
                weight = getattr(stock.model.layers[i], sublayer.pre_norm).weight
                weight.copy_((weight + offset) / (i + 1) ** 0.5 - offset)
        # The norms of all these hosts are computed in float32.
        assert relative_max_error(model(ids).logits, stock(ids).logits) < 1e-6
    assert relative_max_error(model(ids).logits, before) > 1e-3


def test_slots_of_moda_take_the_scaled_input():
    model, seen = random_case("layer_norm_scaling, MoDA"), {}
    for i, layer in enumerate(model.model.layers):
        for name in ("post_attention_layernorm", "mlp", "mlp_depth_kv"):
            module = getattr(layer, name)
            if module is not None:
                module.register_forward_hook(
                    lambda _, args, output, key=(i, name): seen.update({key: (args[0], output)})
                )
    model(random_ids(2, 9))
    for i in range(3):
        scaled = seen[i, "post_attention_layernorm"][1] / (i + 1) ** 0.5
        torch.testing.assert_close(seen[i, "mlp"][0], scaled)
        if (i, "mlp_depth_kv") in seen:
            torch.testing.assert_close(seen[i, "mlp_depth_kv"][0], scaled)
    assert (1, "mlp_depth_kv") in seen


@pytest.mark.parametrize("connection", ["layer_norm_scaling", "keel"])
def test_hosts_without_pre_norm_are_refused_by_name(connection):
    with pytest.raises(StrictDataclassError, match=rf"connection: '{connection}' needs .* but 'olmo2' has the layout"):
        DepthAttnConfig(text_config=tiny_host_config("olmo2"), connection=connection)


@pytest.mark.parametrize("connection", ["layer_norm_scaling", "keel"])
def test_hosts_with_further_norms_give_a_warning(connection, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_depthattn.depth_option_checks.logger.warning_once", warnings.append)
    DepthAttnConfig(text_config=tiny_host_config("gemma2"), connection=connection)
    assert warnings and f"'gemma2' also has norms after its sublayers, so connection='{connection}'" in warnings[0]
    warnings.clear()
    DepthAttnConfig(text_config=tiny_host_config("llama"), connection=connection)
    assert not warnings
