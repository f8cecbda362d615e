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


def test_a_complete_state_is_not_overwritten(process_group, config, tmp_path):
    pipeline, optimizer = training(config)
    save_training_state(pipeline, optimizer, tmp_path / "state", step=1)
    with pytest.raises(UserError, match="state: has a state already; choose another folder"):
        save_training_state(pipeline, optimizer, tmp_path / "state", step=2)
    # An interrupted attempt leaves no `.metadata`.
    (tmp_path / "state" / ".metadata").unlink()
    save_training_state(pipeline, optimizer, tmp_path / "state", step=2)
    assert load_training_state(pipeline, optimizer, tmp_path / "state") == 2


def freeze_embeddings(pipeline) -> None:
    for model in pipeline.models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name != "model.embed_tokens.weight")


def trainable(pipeline) -> list[torch.nn.Parameter]:
    return [parameter for parameter in pipeline.parameters() if parameter.requires_grad]


def test_states_of_other_optimizers_are_refused(process_group, config, tmp_path):
    """Also if only some parameters have no state: their moments would be zero, and the options those of nobody."""
    pipeline, _ = training(config)
    freeze_embeddings(pipeline)
    optimizer = torch.optim.AdamW(trainable(pipeline), lr=1e-3)
    save_training_state(pipeline, optimizer, tmp_path / "state", step=1)
    with pytest.raises(
        UserError, match="is of another optimizer than SGD, or of another version of it: the options a"
    ):
        load_training_state(pipeline, torch.optim.SGD(trainable(pipeline)), tmp_path / "state")
    resumed, _ = training(config, seed=1)
    before = [parameter.clone() for parameter in resumed.parameters()]
    with pytest.raises(
        UserError, match=r"no options of the optimizer for model\.embed_tokens\.weight, which it trains"
    ):
        load_training_state(resumed, torch.optim.AdamW(resumed.parameters()), tmp_path / "state")
    assert all(map(torch.equal, before, resumed.parameters()))


def test_options_are_those_of_any_parameter_that_was_trained(process_group, config, tmp_path):
    """A scheduler's option is restored too, and frozen parameters need none."""
    pipeline, _ = training(config)
    freeze_embeddings(pipeline)
    optimizer = torch.optim.AdamW(trainable(pipeline), lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    save_training_state(pipeline, optimizer, tmp_path / "state", step=1)
    # The first parameter of the group is the frozen one.
    named = [(f"{i}.{name}", p) for i, model in enumerate(pipeline.models) for name, p in model.named_parameters()]
    for parameters in (list(pipeline.parameters()), named):
        every_parameter = torch.optim.AdamW(parameters, lr=1.0)
        load_training_state(pipeline, every_parameter, tmp_path / "state")
        (group,) = every_parameter.param_groups
        assert (group["lr"], group["initial_lr"]) == (5e-4, 1e-3)
    save_training_state(pipeline, every_parameter, tmp_path / "named", step=1)
    load_training_state(pipeline, optimizer, tmp_path / "named")
    assert "param_names" not in optimizer.param_groups[0]
