"""Models with MoDA and head gates, for tests of integrations."""

from model_checks import depth_model, randomise_depth
from tiny_hosts import tiny_stock_model
from torch import nn

from hf_depthattn import DepthAttnForCausalLM

#: label -> fields of the config: MoDA alone, and in one model with AttnRes.
COMBINATIONS = {
    "MoDA": {"connection": "residual"},
    "AttnRes and MoDA": {"connection": "attn_res", "sublayers_per_block": 2, "read_scale": "sum"},
}


def moda_model(host: str | nn.Module = "llama", *, open_gates: bool = True, **fields) -> DepthAttnForCausalLM:
    """Build a model with MoDA from the weights of a stock model.

    Args:
        host: the stock model, or a model type for a tiny one.
        open_gates: use non-zero gates and queries.
        **fields: fields of `DepthAttnConfig`.
    """
    stock = tiny_stock_model(host) if isinstance(host, str) else host
    moda = {"depth_kv": "attention+mlp", "depth_gate": "head", "connection": "residual"}
    model = depth_model(stock, **{**moda, **fields})
    if open_gates:
        randomise_depth(model)
    return model
