"""What crosses the boundaries of pipeline stages: the paper's formulas, and every item there when it is used."""

import itertools
from fractions import Fraction

import pytest
from tiny_hosts import tiny_host_config

from hf_depthattn import DepthAttnConfig
from hf_depthattn.distributed.depth_items import items_read, state_items
from hf_depthattn.distributed.stage_plan import boundary_channels, loop_ranks, plan_stages, split_layers, v_ranks

FULL = {"sublayers_per_block": 1}
BLOCK_MODA = {"sublayers_per_block": 5, "depth_kv": "attention+mlp"}

#: Case of the table -> P, V, layers, fields, and the units of naive and cached transfer.
TRAFFIC = {
    "P2 V2, Full": (2, 2, 8, FULL, 27, 13),
    "P2 V4, Full": (2, 4, 8, FULL, 63, 15),
    "P4 V2, Full": (4, 2, 16, FULL, 119, 75),
    "P4 V4, Full": (4, 4, 16, FULL, 255, 87),
    "P4 V2, Block 4": (4, 2, 16, {"sublayers_per_block": 4}, 35, 21),
    "P4 V2, Block 5": (4, 2, 16, {"sublayers_per_block": 5}, 32, 22),
    "P2 V2, Block 5, MoDA": (2, 2, 8, BLOCK_MODA, 33, 18),
    "P2 V2, Block 5, 3 slots": (2, 2, 8, {**BLOCK_MODA, "num_depth_slots": 3}, 18, 15),
    "residual": (4, 2, 8, {"connection": "residual"}, 7, 7),
}

MOE_LAYERS = 12
CASES = {
    "full": FULL,
    "block 5": {"sublayers_per_block": 5},
    "window 3": {"sublayers_per_block": 1, "depth_window": 3},
    "MoDA": BLOCK_MODA,
    "3 slots": {"connection": "residual", "depth_kv": "attention+mlp", "num_depth_slots": 3},
    "explicit slots": {
        "connection": "residual",
        "depth_kv": "attention",
        "depth_slots": [[], [0], [], [0, 2], [], [], [0, 10], [], [], [2], [], [0, 18]],
    },
    "value residual": {"sublayers_per_block": 3, "value_residual": True},
    "streams": {"connection": "mhc"},
    "dense_former": {"connection": "dense_former"},
    "x0_lambdas": {"connection": "x0_lambdas"},
    "delta": {"connection": "delta"},
}
RANKS = {
    "P2": loop_ranks(2, 1),
    "P2 V2": loop_ranks(2, 2),
    "P3 V4": loop_ranks(3, 4),
    "P4 V2": loop_ranks(4, 2),
    "V of 2": v_ranks(2),
    "V of 4": v_ranks(4),
}


def make_config(num_layers, fields):
    # A slot, 2 heads of 8 channels for the key and for the value, is as large as a source.
    host = tiny_host_config("qwen3_moe", num_hidden_layers=num_layers, num_key_value_heads=2, head_dim=8)
    return DepthAttnConfig(text_config=host, **fields)


def units(config, plans):
    return Fraction(sum(boundary_channels(config, plans)), config.hidden_size)


@pytest.mark.parametrize("case", TRAFFIC.values(), ids=TRAFFIC.keys())
def test_traffic_of_the_table(case):
    num_ranks, num_virtual, num_layers, fields, naive, cached = case
    config = make_config(num_layers, fields)
    layers = split_layers(num_layers, num_ranks * num_virtual)
    ranks = loop_ranks(num_ranks, num_virtual)
    assert units(config, plan_stages(config, layers, ranks, cross_stage_cache=False)) == naive
    assert units(config, plan_stages(config, layers, ranks)) == cached


@pytest.mark.parametrize("num_ranks, num_virtual", [(2, 1), (2, 2), (3, 2), (4, 2), (2, 4), (4, 4)])
@pytest.mark.parametrize("blocks_per_stage", [1, 2, 4])
def test_traffic_is_that_of_the_formulas(num_ranks, num_virtual, blocks_per_stage):
    num_stages = num_ranks * num_virtual
    num_layers, P, V = 2 * num_stages, num_ranks, num_virtual
    config = make_config(num_layers, {"sublayers_per_block": 4 // blocks_per_stage})
    layers, ranks = split_layers(num_layers, num_stages), loop_ranks(num_ranks, num_virtual)
    naive = Fraction(num_stages * (num_stages - 1), 2) * blocks_per_stage + num_stages - 1
    assert units(config, plan_stages(config, layers, ranks, cross_stage_cache=False)) == naive
    cached = (Fraction(P * (P - 1), 2) + (V - 1) * P * (P - 1)) * blocks_per_stage + P - 1
    assert units(config, plan_stages(config, layers, ranks)) == cached


@pytest.mark.parametrize("cross_stage_cache", [True, False], ids=["cached", "naive"])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_every_item_is_there_when_it_is_used_and_gone_afterwards(fields, ranks, cross_stage_cache):
    config = make_config(MOE_LAYERS, fields)
    routers = range(1, MOE_LAYERS, 2)
    layers = split_layers(MOE_LAYERS, len(ranks))
    plans = plan_stages(config, layers, ranks, cross_stage_cache=cross_stage_cache, routers=routers)
    caches = {rank: set() for rank in ranks}
    handed = ()
    for plan in plans:
        cache = caches[plan.rank]
        assert plan.received == handed
        assert cache >= set(plan.cached)
        assert not set(plan.received) & set(plan.cached)
        at_entry = () if plan.is_first else state_items(config, plan.layers.start, routers)
        assert set(plan.takes) >= items_read(config, at_entry, plan.layers)
        new = () if plan.is_last else set(state_items(config, plan.layers.stop, routers)) - set(at_entry)
        assert {*plan.takes, *new} >= set(plan.gives)
        cache |= set(plan.kept)
        cache -= set(plan.last_read)
        assert not plan.is_last or not any(caches.values())
        handed = plan.gives


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_no_rank_gets_an_item_twice_and_gradients_have_one_owner(fields, ranks):
    config = make_config(MOE_LAYERS, fields)
    plans = plan_stages(config, split_layers(MOE_LAYERS, len(ranks)), ranks, routers=range(MOE_LAYERS))
    for rank in set(ranks):
        own = [plan for plan in plans if plan.rank == rank]
        assert [plan.first_on_rank for plan in own] == [True] + [False] * (len(own) - 1)
        from_others = [
            item for plan in own if not plan.is_first and ranks[plan.index - 1] != rank for item in plan.received
        ]
        assert len(set(from_others)) == len(from_others)
        owned = [item for plan in own for item in plan.owned]
        assert len(set(owned)) == len(owned)
        assert set(owned) == {item for plan in own for item in (*plan.received, *plan.gives)}


def test_a_slot_that_a_later_stage_reads_waits_in_the_cache():
    config = make_config(MOE_LAYERS, CASES["explicit slots"])
    plans = plan_stages(config, split_layers(MOE_LAYERS, 4), loop_ranks(2, 2))
    slot = ("depth_key", 0)
    # Layers 6-8 (rank 0) and 9-11 (rank 1) both read the slot of layer 0.
    assert slot in plans[1].received
    assert all(slot in plan.cached for plan in plans[2:])
    assert all(slot not in plan.received for plan in plans[2:])


@pytest.mark.parametrize("num_layers, num_stages", list(itertools.product([7, 8], [1, 2, 3, 7])))
def test_layers_are_split_evenly(num_layers, num_stages):
    layers = split_layers(num_layers, num_stages)
    assert [layer for each in layers for layer in each] == list(range(num_layers))
    assert max(map(len, layers)) - min(map(len, layers)) <= 1


@pytest.mark.parametrize("num_stages", [0, 9])
def test_stages_without_layers_are_refused(num_stages):
    with pytest.raises(ValueError, match=f"num_stages: {num_stages} must be between 1 and 8"):
        split_layers(8, num_stages)


@pytest.mark.parametrize(
    "layers, given",
    [
        ([range(2), range(3, 4)], "0-1, 3-3"),
        ([range(4), range(4, 4)], "0-3, none"),
        ([range(3)], "0-2"),
        ([range(2, 4), range(2)], "2-3, 0-1"),
    ],
)
def test_stages_that_are_not_the_model_are_refused(layers, given):
    with pytest.raises(ValueError, match=f"layers: the stages have {given}; they must have the layers 0 to 3"):
        plan_stages(make_config(4, FULL), layers, [0] * len(layers))


def test_every_stage_needs_a_rank():
    with pytest.raises(ValueError, match="ranks: 1 ranks for 2 stages"):
        plan_stages(make_config(4, FULL), split_layers(4, 2), [0])
