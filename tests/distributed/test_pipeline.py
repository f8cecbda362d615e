"""Pipelines on several gloo processes compute what one process does (`support/pipeline_processes.py`)."""

from unittest.mock import Mock

import needs_stage_interface  # noqa: F401
import pytest
import torch
import torch.distributed as dist
from depth_forms import random_model
from pipeline_processes import GROUPS, check_gradients
from process_groups import passed_cases
from tiny_hosts import random_ids, tiny_host_config
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_depthattn import DepthAttnConfig
from hf_depthattn.distributed.pipeline import DepthPipeline, build_pipeline
from hf_depthattn.distributed.stage_runtime import DepthPipelineStage


def test_two_processes_compute_what_one_does(tmp_path):
    """Loss and gradients, bytes as planned, nothing left, accumulation, new shapes, evaluation, the norm."""
    assert passed_cases("pipeline_processes.py", 2, tmp_path, "two") == list(GROUPS["two"])


@pytest.mark.slow
@pytest.mark.parametrize(("group", "num_processes"), [("all-of-two", 2), ("four", 4), ("fsdp2", 4), ("ddp", 4)])
def test_every_schedule_and_composition_computes_what_one_process_does(tmp_path, group, num_processes):
    assert passed_cases("pipeline_processes.py", num_processes, tmp_path, group) == list(GROUPS[group])


def config() -> DepthAttnConfig:
    return DepthAttnConfig(text_config=tiny_host_config("llama"), sublayers_per_block=1)


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        ("1F1B", {"stages_per_rank": 2}, "stages_per_rank: 2 is not possible with Schedule1F1B, only 1"),
        ("ZBVZeroBubble", {"stages_per_rank": 3}, "stages_per_rank: 3 is not possible with ScheduleZBVZeroBubble"),
        ("LoopedBFS", {"stages_per_rank": 4}, "num_stages: 4 must be between 1 and 3"),
        ("Interleaved", {}, "Unknown schedule name 'Interleaved'"),
        ("GPipe", {"num_microbatches": 0}, "num_microbatches: 0 must be at least 1"),
        ("GPipe", {"parallelize": nn.Sequential}, "parallelize: it returned a Sequential; it must return the model"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(process_group, schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_pipeline(config(), schedule, **{"num_microbatches": 2, "device": "cpu", **arguments})


def test_one_rank_trains_a_checkpoint_in_stages(process_group, tmp_path):
    """The stages of one rank pass tensors to each other; the model is in training mode, also when it is loaded."""
    model = random_model("llama", sublayers_per_block=1).train()
    model.save_pretrained(tmp_path)
    pipeline = build_pipeline(
        tmp_path, "LoopedBFS", num_microbatches=2, device="cpu", layers=[range(0, 2), range(2, 3)]
    )
    assert all(part.training for part in pipeline.models)
    ids = random_ids(2, 7)
    expected = model(ids, labels=ids, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(pipeline.step(ids, ids), expected.detach())
    check_gradients(pipeline, model, 3e-6)


def test_stages_per_rank_and_layers_must_agree(process_group):
    with pytest.raises(ValueError, match="stages_per_rank: 3 with 2 stages in layers and 1 ranks"):
        build_pipeline(
            config(), "LoopedBFS", num_microbatches=2, device="cpu", stages_per_rank=3, layers=[range(2), range(2, 3)]
        )


@pytest.mark.parametrize("wrapper", ["fsdp2", "ddp"])
@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_zero_bubble_schedules_are_refused_with_data_parallelism(process_group, schedule, wrapper):
    mesh = dist.init_device_mesh("cpu", (1,))

    def parallelize(model):
        return nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else fully_shard(model, mesh=mesh)

    with pytest.raises(ValueError, match="torch loses gradients silently; use GPipe, 1F1B"):
        build_pipeline(config(), schedule, num_microbatches=2, device="cpu", parallelize=parallelize)


def pipeline_of_two_stages() -> DepthPipeline:
    layers = [range(0, 2), range(2, 3)]
    return build_pipeline(config(), "LoopedBFS", num_microbatches=2, device="cpu", layers=layers)


def gradients_of(pipeline: DepthPipeline) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in pipeline.parameters()]


IDS = random_ids(4, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[:3]}, "input_ids: 3 rows must be a multiple of num_microbatches 2"),
        ({"labels": IDS[:2]}, r"labels: got shape \(2, 5\); it must have 4 rows"),
        ({"position_ids": torch.arange(5)[None]}, r"position_ids: got shape \(1, 5\); it must have 4 rows"),
        ({"use_cache": True}, "use_cache: True is not possible in a pipeline stage"),
    ],
)
def test_a_refused_step_keeps_accumulated_gradients(process_group, arguments, message):
    """It is refused before any stage runs, on every rank, so that none waits for another."""
    pipeline = pipeline_of_two_stages()
    pipeline.step(IDS, IDS)
    before = gradients_of(pipeline)
    with pytest.raises(ValueError, match=message):
        pipeline.step(**{"input_ids": IDS, "labels": IDS, **arguments})
    torch.testing.assert_close(gradients_of(pipeline), before, rtol=0, atol=0)


@pytest.mark.parametrize("num_steps_before", [0, 1])
def test_a_step_that_failed_can_be_repeated(process_group, monkeypatch, num_steps_before):
    pipeline = pipeline_of_two_stages()
    pipeline.step(IDS, IDS)
    expected = gradients_of(pipeline)
    pipeline = pipeline_of_two_stages()
    for _ in range(num_steps_before):
        pipeline.step(IDS, IDS)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match=r"out of memory|run forward"):
        patched.setattr(pipeline.models[1], "forward", Mock(side_effect=RuntimeError("out of memory")))
        pipeline.step(IDS, IDS)
    assert not any(stage.cache.tensors or stage.fwd_cache for stage in pipeline.stages)
    for model in pipeline.models:
        model.zero_grad()
    pipeline.step(IDS, IDS)
    torch.testing.assert_close(gradients_of(pipeline), expected)


def test_unfreezing_without_a_reset_is_refused(process_group):
    pipeline = pipeline_of_two_stages()
    embeddings = pipeline.models[0].get_input_embeddings().weight.requires_grad_(False)
    pipeline.step(IDS, IDS)
    embeddings.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"call `reset_shapes\(\)` on all ranks"):
        pipeline.step(IDS, IDS)
    pipeline.reset_shapes()
    pipeline.step(IDS, IDS)
    assert embeddings.grad.any()


def test_shifted_labels_are_counted(process_group):
    """They are those of the loss, and `labels` then only say that one is wanted."""
    pipeline = pipeline_of_two_stages()
    labels = IDS.clone()
    labels[:, :3] = -100
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(pipeline.evaluate(IDS, IDS, shift_labels=shifted), pipeline.evaluate(IDS, labels))


def test_evaluation_restores_the_mode_of_every_module(process_group):
    pipeline = pipeline_of_two_stages()
    pipeline.models[0].model.layers[1].eval()
    before = [module.training for model in pipeline.models for module in model.modules()]
    pipeline.evaluate(IDS, IDS)
    assert [module.training for model in pipeline.models for module in model.modules()] == before
    assert any(before) and not all(before)


@pytest.mark.parametrize("schedule", ["GPipe", "LoopedBFS"])
def test_an_evaluation_keeps_no_outputs_of_microbatches(process_group, monkeypatch, schedule):
    held = []
    clear = DepthPipelineStage.clear_runtime_states
    monkeypatch.setattr(
        DepthPipelineStage, "clear_runtime_states", lambda stage: [held.append(len(stage.fwd_cache)), clear(stage)]
    )
    layers = [range(0, 3)] if schedule == "GPipe" else [range(0, 2), range(2, 3)]
    pipeline = build_pipeline(config(), schedule, num_microbatches=4, device="cpu", layers=layers)
    pipeline.evaluate(IDS, IDS)
    assert held and not any(held)
