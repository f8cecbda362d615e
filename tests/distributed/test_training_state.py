"""States of training in one process; `support/checkpoint_processes.py` has those of several."""

import itertools

import needs_stage_interface  # noqa: F401
import pytest
import torch
from depth_forms import random_model
from tiny_hosts import random_ids

from hf_depthattn import DepthAttnConfig, depth_param_groups
from hf_depthattn.distributed.pipeline import build_pipeline
from hf_depthattn.distributed.training_state import load_training_state, save_training_state
from hf_depthattn.errors import UserError


def training(config: DepthAttnConfig, seed: int = 0):
    pipeline = build_pipeline(config, "LoopedBFS", num_microbatches=2, device="cpu", stages_per_rank=3, seed=seed)
    groups = [depth_param_groups(model, lr=1e-3, depth_lr_factor=5.0) for model in pipeline.models]
    return pipeline, torch.optim.AdamW(itertools.chain(*groups))


def step(pipeline, optimizer, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    ids = random_ids(4, 9)
    loss = pipeline.step(ids, labels=ids)
    optimizer.step()
    optimizer.zero_grad()
    return loss


@pytest.fixture
def config() -> DepthAttnConfig:
    return random_model("llama", {"tie_word_embeddings": True}, sublayers_per_block=1).config


def test_training_goes_on_where_it_was(process_group, config, tmp_path):
    pipeline, optimizer = training(config)
    step(pipeline, optimizer, 1)
    save_training_state(pipeline, optimizer, tmp_path / "state", step=1)
    expected = [step(pipeline, optimizer, seed) for seed in (2, 3)]
    resumed, other_optimizer = training(config, seed=1)
    rates = [group["lr"] for group in other_optimizer.param_groups]
    for group in other_optimizer.param_groups:
        group["lr"] = 1.0
    assert load_training_state(resumed, other_optimizer, tmp_path / "state") == 1
    assert [group["lr"] for group in other_optimizer.param_groups] == rates
    assert set(rates) == {1e-3, 5e-3}
    assert all(group["betas"] == (0.9, 0.999) for group in other_optimizer.param_groups)
    assert [step(resumed, other_optimizer, seed) for seed in (2, 3)] == expected


def test_copies_of_a_shared_parameter_have_states_of_their_own(process_group, config, tmp_path):
    pipeline, optimizer = training(config)
    step(pipeline, optimizer, 1)
    save_training_state(pipeline, optimizer, tmp_path / "state", step=1)
    load_training_state(pipeline, optimizer, tmp_path / "state")
    copies = [model.model.depth_reads.query for model in pipeline.models]
    averages = [optimizer.state[copy]["exp_avg"] for copy in copies]
    assert len({average.data_ptr() for average in averages}) == 3
    assert all(torch.equal(average, averages[0]) for average in averages)


def test_states_that_do_not_fit_are_refused(process_group, config, tmp_path):
    pipeline, optimizer = training(config)
    save_training_state(pipeline, optimizer, tmp_path / "state", step=0)
    other = random_model("llama", connection="delta").config
    with pytest.raises(UserError, match=r"it lacks \d+ tensors, first model.layers.0.attn_depth.query"):
        load_training_state(*training(other), tmp_path / "state")
    with pytest.raises(UserError, match=r"is no complete checkpoint of torch\.distributed\.checkpoint"):
        load_training_state(pipeline, optimizer, tmp_path)
