"""Memory and traffic of a training step: the counted parts against models, formulas and each other."""

import gc

import pytest
import torch
from depth_forms import random_model
from tiny_hosts import tiny_host_config

from hf_depthattn import DepthAttnConfig
from hf_depthattn.distributed.capacity import Axes, Workload, held_items, plan_capacity
from hf_depthattn.distributed.depth_items import item_channels
from hf_depthattn.distributed.parameter_counts import count_parameters
from hf_depthattn.distributed.stage_plan import loop_ranks, plan_stages, split_layers

B, T, D = 2, 7, 32
KEPT = {
    "full": {"sublayers_per_block": 1},
    "block 4": {"sublayers_per_block": 4},
    "residual": {"connection": "residual"},
    "MoDA": {"connection": "residual", "depth_kv": "attention+mlp"},
    "dense_former": {"connection": "dense_former"},
    "streams": {"connection": "mhc"},
}


def make_config(num_layers, fields):
    return DepthAttnConfig(text_config=tiny_host_config("llama", num_hidden_layers=num_layers), **fields)


def held_elements(num_layers, fields):
    """What the plan says that a model of one stage keeps."""
    config = make_config(num_layers, fields)
    plans = plan_stages(config, split_layers(num_layers, 1), [0])
    return B * T * sum(item_channels(config, item) for item in held_items(config, plans[0], plans))


def kept_elements(num_layers, fields):
    """What a checkpointed model keeps between forward and backward beside its parameters."""
    torch.manual_seed(0)
    model = random_model("llama", {"num_hidden_layers": num_layers}, **fields).train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    tokens = torch.randint(3, 90, (B, T))
    # Python then lists new objects only.
    gc.freeze()
    try:
        loss = model(tokens).logits.sum()
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
    finally:
        gc.unfreeze()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # Not the weights of reads, which are as many as layers.
        if tensor.dim() >= 3 and tensor.is_floating_point() and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
    loss.backward()
    return sum(found.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("fields", KEPT.values(), ids=KEPT.keys())
def test_layers_keep_the_depth_state_that_is_counted(fields):
    # The difference between two depths leaves out what all depths have: masks, rotary embeddings, the final norm.
    counted = held_elements(6, fields) - held_elements(4, fields)
    assert kept_elements(6, fields) - kept_elements(4, fields) == counted > 0


def plan_of(axes, fields=KEPT["full"], num_layers=8, num_microbatches=8, schedule="interleaved"):
    config = make_config(num_layers, fields)
    workload = Workload(T, B, num_microbatches, schedule)
    return plan_capacity(config, count_parameters(config, axes.tensor), axes, workload)


def test_states_of_parameters_are_those_of_mixed_precision_and_adamw():
    plan = plan_of(Axes(2, 2, fsdp=4, data=3))
    assert plan.axes.num_gpus == 24
    for rank in plan.ranks:
        share = -(-rank.num_parameters // 4)
        assert rank.parameters == 4 * share + 2 * rank.num_parameters
        assert rank.gradients == 4 * share + 4 * rank.num_parameters
        assert rank.optimizer == 8 * share
        assert rank.total > rank.parameters + rank.gradients + rank.optimizer


def test_without_a_pipeline_two_layers_are_whole():
    (rank,) = plan_of(Axes(1, 1, fsdp=4), schedule="1f1b").ranks
    count = count_parameters(make_config(8, KEPT["full"]))
    whole = 2 * count.layers[0].num_parameters + count.first.num_parameters + count.last.num_parameters
    whole += count.every.num_parameters
    assert rank.parameters == 4 * -(-rank.num_parameters // 4) + 2 * whole


def test_traffic_is_in_bytes_per_microbatch():
    plan = plan_of(Axes(2, 2))
    unit = 2 * B * T * D
    assert sum(plan.boundaries) == 13 * unit
    assert sum(plan.uncached_boundaries) == 27 * unit


def test_only_the_last_rank_has_logits():
    plan = plan_of(Axes(4, 2))
    assert [rank.logits > 0 for rank in plan.ranks] == [False, False, False, True]
    assert plan.ranks[-1].logits == 12 * B * T * 97


@pytest.mark.parametrize("schedule, in_flight", [("gpipe", [8, 8, 8, 8]), ("1f1b", [4, 3, 2, 1])])
def test_depth_state_is_that_of_the_microbatches_in_flight(schedule, in_flight):
    config = make_config(8, KEPT["full"])
    plans = plan_stages(config, split_layers(8, 4), loop_ranks(4, 1))
    channels = [sum(item_channels(config, item) for item in held_items(config, plan, plans)) for plan in plans]
    # A stage of two layers makes four sources and has the others from before.
    assert channels == [5 * D, 9 * D, 13 * D, 15 * D]
    ranks = plan_of(Axes(4, 1), schedule=schedule).ranks
    assert [rank.depth_state for rank in ranks] == [
        2 * B * T * number * each for number, each in zip(in_flight, channels, strict=True)
    ]


def test_a_rank_holds_a_cached_item_once():
    config = make_config(8, KEPT["full"])
    plans = plan_stages(config, split_layers(8, 4), loop_ranks(2, 2))
    for rank in (0, 1):
        held = [item for plan in plans if plan.rank == rank for item in held_items(config, plan, plans)]
        assert len(set(held)) == len(held)


def test_more_stages_per_rank_wait_less():
    assert plan_of(Axes(2, 1), schedule="1f1b").idle_share == pytest.approx(1 / 9)
    assert plan_of(Axes(2, 2)).idle_share == pytest.approx(1 / 17)
