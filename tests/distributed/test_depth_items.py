"""The items of a boundary are what the layers after it need, and have the sizes that the plan says."""

import pytest
import torch
from connection_cases import FIELDS
from depth_forms import random_model

from hf_depthattn import DepthAttnConfig
from hf_depthattn.depth_state import DepthState
from hf_depthattn.distributed.depth_items import (
    StateItem,
    depth_state_items,
    item_channels,
    sources_after,
    state_items,
)

NUM_LAYERS = 5
HOST = {"num_hidden_layers": NUM_LAYERS}
EXPLICIT_SLOTS = [[], [0, 1], [1], [0, 4, 5], [3, 6]]

CASES = FIELDS | {
    "block 3": {"sublayers_per_block": 3},
    "block 4": {"sublayers_per_block": 4},
    "window 1": {"sublayers_per_block": 1, "depth_window": 1},
    "window 2, block 3": {"sublayers_per_block": 3, "depth_window": 2},
    "window 3, static": {"sublayers_per_block": 2, "depth_window": 3, "static_mix": True},
    "MoDA": {"connection": "residual", "depth_kv": "attention+mlp"},
    "2 slots": {"sublayers_per_block": 3, "depth_kv": "attention+mlp", "num_depth_slots": 2},
    "explicit slots": {"connection": "residual", "depth_kv": "attention+mlp", "depth_slots": EXPLICIT_SLOTS},
    "value residual": {"value_residual": True, "value_residual_init": "resformer", "depth_kv": "attention"},
}


def entering_states(model, tokens, layer=None, change=lambda state: state):
    """Return the output of a model and the states before its layers; `change` is applied before one of them."""
    states = {}

    def hook(module, args):
        state = args[0]
        if not isinstance(state, DepthState):
            return None
        states[module.layer_idx] = state
        return (change(state), *args[1:]) if module.layer_idx == layer else None

    handles = [each.register_forward_pre_hook(hook) for each in model.base_model.layers]
    try:
        with torch.no_grad():
            return model(tokens).logits, states
    finally:
        for handle in handles:
            handle.remove()


def only_items(config, layer, state):
    items = depth_state_items(config, layer)
    return DepthState(
        tuple(state.sources[item.index] for item in items.sources),
        state.partial,
        depth_keys=state.depth_keys,
        depth_values=state.depth_values,
        first_value=state.first_value if items.first_value else None,
    )


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request):
    """A model whose layers begin with settled states, tokens, its logits, and the states before its layers."""
    torch.manual_seed(0)
    model = random_model("llama", HOST, **request.param).eval()
    model.config.attn_res_schedule = "layer"
    tokens = torch.randint(3, 90, (2, 7))
    return model, tokens, *entering_states(model, tokens)


def test_layers_need_no_more_than_the_items(case):
    model, tokens, expected, states = case
    assert states.keys() == set(range(1, NUM_LAYERS))
    for layer in states:

        def only_listed(state, layer=layer):
            return only_items(model.config, layer, state)

        logits, _ = entering_states(model, tokens, layer, only_listed)
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_items_are_those_of_the_state_with_their_sizes(case):
    model, _, _, states = case
    for layer, state in states.items():
        items = depth_state_items(model.config, layer)
        names = sources_after(model.config, range(layer))
        assert names == tuple(StateItem("source", index) for index in range(len(state.sources)))
        tensors = dict(zip(names, state.sources, strict=True)) | {items.partial: state.partial}
        tensors |= dict(zip(items.depth_keys, state.depth_keys, strict=True))
        tensors |= dict(zip(items.depth_values, state.depth_values, strict=True))
        if items.first_value:
            tensors[items.first_value] = state.first_value
        listed = state_items(model.config, layer)
        assert len(set(listed)) == len(listed)
        for item in listed:
            assert tensors[item].numel() == 2 * 7 * item_channels(model.config, item), item


def test_a_finished_block_is_the_source_that_it_becomes():
    config = random_model("llama", HOST, sublayers_per_block=4).config
    assert depth_state_items(config, 2).partial == ("source", 1)
    assert depth_state_items(config, 3).partial == ("partial", 6)
    assert ("source", 1) in depth_state_items(config, 3).sources


def test_a_window_leaves_the_embedding_and_the_newest_sources():
    config = random_model("llama", HOST, sublayers_per_block=1, depth_window=2).config
    # The newest source of the window is the open block.
    assert depth_state_items(config, 4).sources == (("source", 0), ("source", 7))
    # A stage that entered with these has made sources 8 (its `partial`) and 9 when it has run layer 4.
    assert sources_after(config, range(4, 5)) == (("source", 0), ("source", 7), ("source", 8), ("source", 9))


def test_first_values_cross_between_the_first_and_the_last_attention_layer():
    layer_types = ["linear_attention", "full_attention", "linear_attention", "full_attention", "linear_attention"]
    fields = {"connection": "residual", "value_residual": True}
    host = {**HOST, "layer_types": layer_types}
    config = random_model("qwen3_next", host, **fields).config
    crossing = [layer for layer in range(1, NUM_LAYERS) if depth_state_items(config, layer).first_value]
    assert crossing == [2, 3]


def test_router_logits_of_earlier_layers_follow_the_state():
    config = random_model("qwen3_moe", HOST, sublayers_per_block=3).config
    routers = [item for item in state_items(config, 3, routers=range(NUM_LAYERS)) if item.kind == "router_logits"]
    assert routers == [("router_logits", 0), ("router_logits", 1), ("router_logits", 2)]
    assert item_channels(config, routers[0]) == 4


def test_router_logits_of_a_host_without_experts_are_refused():
    config = DepthAttnConfig.attn_res(random_model("llama").config.text_config)
    with pytest.raises(ValueError, match="'llama' has none of the fields num_experts"):
        item_channels(config, StateItem("router_logits", 0))
