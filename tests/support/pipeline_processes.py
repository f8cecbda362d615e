"""Models in pipeline stages on several gloo processes beside the same models in one.

    python pipeline_processes.py NUM_PROCESSES FOLDER GROUP

It runs all cases of a group and prints the names of those that every process has passed. The processes are forked
after the imports, which take longer than the cases.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from depth_forms import random_model
from pipeline_cases import ALL_OF_TWO_PROCESSES, COMPOSED, FOUR_PROCESSES, FULL, TWO_PROCESSES, Case
from tiny_hosts import random_ids
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from hf_depthattn.distributed.depth_items import item_channels
from hf_depthattn.distributed.pipeline import DepthPipeline, build_pipeline
from hf_depthattn.distributed.stage_runtime import DepthPipelineStage

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
#: A single gradient in float32 may be off by this many times the tolerance of all of a stage.
_EACH_FLOAT32 = 4
_ROWS, _LENGTH = 2, 7


def model_of(case: Case) -> nn.Module:
    """The same whole model in every process."""
    torch.manual_seed(0)
    model = random_model(case.host, {"num_hidden_layers": case.num_layers, **case.host_fields}, **case.fields)
    return prepared(model, case)


def prepared(model: nn.Module, case: Case) -> nn.Module:
    """Set the dtype, and prepare a whole model or one of a stage."""
    # The grouped matrix product of MoE hosts does not support float64.
    model.set_experts_implementation("eager")
    model = model.to(case.dtype).train()
    if case.prepare is not None:
        case.prepare(model)
    return model


def batch_of(case: Case, length: int = _LENGTH, seed: int = 1) -> dict[str, Tensor]:
    """A batch; some tokens have no label."""
    torch.manual_seed(seed)
    ids = random_ids(_ROWS * case.num_microbatches, length)
    labels = ids.clone()
    labels[::2, :3] = -100
    if not case.padded:
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    mask[1::2, :2] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def autocast_of(case: Case) -> contextlib.AbstractContextManager:
    """The context in which a case runs."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if case.autocast else contextlib.nullcontext()


def expected_loss(model: nn.Module, case: Case, batch: dict[str, Tensor]) -> Tensor:
    """Add the gradients of a batch to the whole model, microbatch by microbatch, and return the loss."""
    num_items = int((batch["labels"][:, 1:] != -100).sum())
    total = torch.zeros(())
    for start in range(0, len(batch["input_ids"]), _ROWS):
        rows = {name: tensor[start : start + _ROWS] for name, tensor in batch.items()}
        with autocast_of(case):
            loss = model(**rows, num_items_in_batch=num_items, use_cache=False).loss
        loss.backward()
        total = total + loss.detach()
    return total


def pipeline_of(
    case: Case, state: dict[str, Tensor], config, wrap: Callable[[nn.Module], nn.Module] | None = None, group=None
) -> DepthPipeline:
    """The stages of this process with the weights of the whole model."""

    def parallelize(model: nn.Module) -> nn.Module:
        model = prepared(model, case)
        # The union of the stages has the keys of the whole model.
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        return model if wrap is None else wrap(model)

    return build_pipeline(
        config,
        case.schedule,
        num_microbatches=case.num_microbatches,
        device="cpu",
        group=group,
        layers=case.layers,
        cross_stage_cache=case.cached,
        parallelize=parallelize,
    )


@contextlib.contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Count the bytes that the stages of this process send."""
    sent = {"forward": 0, "backward": 0}

    def count(way: str, name: str):
        stock = getattr(DepthPipelineStage, name)

        def counting(stage, microbatch):
            operations = stock(stage, microbatch)
            sent[way] += sum(each.tensor.numel() * each.tensor.element_size() for each in operations)
            return operations

        return patch.object(DepthPipelineStage, name, counting)

    with count("forward", "get_fwd_send_ops"), count("backward", "get_bwd_send_ops"):
        yield sent


def planned_bytes(pipeline: DepthPipeline, case: Case, config) -> dict[str, int]:
    """The bytes that the plan has for the stages of this process in one step."""
    per_channel = _ROWS * _LENGTH * case.num_microbatches * case.dtype.itemsize
    planned = {"forward": 0, "backward": 0}
    for stage in pipeline.stages:
        ranks = stage.stage_index_to_group_rank
        for way, neighbour, items in (("forward", 1, stage.plan.gives), ("backward", -1, stage.plan.received)):
            if ranks.get(stage.stage_index + neighbour, stage.group_rank) != stage.group_rank:
                planned[way] += per_channel * sum(item_channels(config, item) for item in items)
    return planned


@contextlib.contextmanager
def counted_leftovers() -> Iterator[list[str]]:
    """Note what stages still hold when a schedule has run its last microbatch, before they are cleared."""
    left: list[str] = []
    clear = DepthPipelineStage.clear_runtime_states

    def noting(stage):
        held = {name: getattr(stage, name) for name in ("fwd_cache", "bwd_cache", "backward_state", "_read_weights")}
        held |= {"tensors": stage.cache.tensors, "gradients": stage.cache.gradients}
        left.extend(f"stage {stage.stage_index}: {len(value)} in {name}" for name, value in held.items() if value)
        clear(stage)

    with patch.object(DepthPipelineStage, "clear_runtime_states", noting):
        yield left


def check_nothing_is_left(pipeline: DepthPipeline) -> None:
    """No tensor of a microbatch outlives the step, and no buffer."""
    for stage in pipeline.stages:
        held = (stage.fwd_cache, stage.bwd_cache, stage.backward_state, stage._read_weights)
        assert not any(held), held
        assert not stage.cache.tensors and not stage.cache.gradients
        assert num_buffers(stage) == 0


def num_buffers(stage: DepthPipelineStage) -> int:
    """The number of tensors that a stage has for what it receives."""
    infos = [*stage.args_recv_info.values(), *stage.grad_recv_info.values()]
    return sum(not info.is_root_arg and info.buffer is not None for of_microbatch in infos for info in of_microbatch)


def check_gradients(pipeline: DepthPipeline, model: nn.Module, tolerance: float) -> None:
    """Every gradient is that of the whole model; in float32, all of a stage together; each within more."""
    expected = dict(model.named_parameters())
    for part in pipeline.models:
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name, parameter in part.named_parameters():
            name = name.removeprefix("module.")
            wanted = expected[name].grad
            if wanted is None or not wanted.any():
                assert parameter.grad is None or not parameter.grad.any(), name
                continue
            assert parameter.grad is not None, name
            found = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            pairs[name] = (found.flatten(), wanted.flatten())
        bound = tolerance
        if pairs and next(model.parameters()).dtype == torch.float32:
            bound = _EACH_FLOAT32 * tolerance
            pairs["all"] = tuple(map(torch.cat, zip(*pairs.values(), strict=True)))
        for name, (found, wanted) in pairs.items():
            error = ((found - wanted).norm() / wanted.norm()).item()
            assert error <= (tolerance if name == "all" else bound), (name, error)


def check_loss(loss: Tensor | None, expected: Tensor, pipeline: DepthPipeline, tolerance: float) -> None:
    """The rank of the last stage has the loss, the others have none."""
    assert (loss is not None) == pipeline.has_last_stage
    if loss is not None:
        assert ((loss - expected).abs() / expected).item() <= tolerance, (loss, expected)


def check(case: Case) -> None:
    """A step, its bytes, a second one whose gradients are added, evaluation, and a batch of another length."""
    model, batch = model_of(case), batch_of(case)
    pipeline = pipeline_of(case, model.state_dict(), model.config)
    tolerance = 5e-3 if case.autocast else case.rounding * _TOLERANCE[case.dtype]
    expected = expected_loss(model, case, batch)
    with counted_bytes() as sent, counted_leftovers() as left, autocast_of(case):
        loss = pipeline.step(**batch)
    check_loss(loss, expected, pipeline, tolerance)
    check_gradients(pipeline, model, tolerance)
    check_nothing_is_left(pipeline)
    if case.counts_bytes:
        planned = planned_bytes(pipeline, case, model.config)
        assert sent == planned, (sent, planned)
    longer = batch_of(case, _LENGTH + 3, seed=2)
    expected = expected_loss(model, case, longer)
    with counted_leftovers() as left_later, autocast_of(case):
        check_loss(pipeline.step(**longer), expected, pipeline, tolerance)
        check_gradients(pipeline, model, tolerance)
        loss = pipeline.evaluate(**longer)
    check_loss(loss, expected, pipeline, tolerance)
    assert not left and not left_later, (left, left_later)
    check_nothing_is_left(pipeline)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(pipeline.clip_grad_norm(0.1), norm.double(), rtol=10 * tolerance, atol=0)
    check_gradients(pipeline, model, 10 * tolerance)


def check_buffers() -> None:
    """The number of receive buffers that exist at once does not grow with the number of microbatches."""
    largest = []
    for num_microbatches in (4, 8):
        case = Case("Interleaved1F1B", FULL, num_microbatches=num_microbatches)
        pipeline = pipeline_of(case, model_of(case).state_dict(), model_of(case).config)
        counts: list[int] = []
        allocate = DepthPipelineStage._allocate_buffers

        def counting(stage, infos, *args, pipeline=pipeline, counts=counts, allocate=allocate):
            allocate(stage, infos, *args)
            counts.append(sum(map(num_buffers, pipeline.stages)))

        with patch.object(DepthPipelineStage, "_allocate_buffers", counting):
            pipeline.step(**batch_of(case))
        largest.append(max(counts))
    assert largest[0] == largest[1] > 0, largest


def check_composed(case: Case, kind: str) -> None:
    """Two ranks of the pipeline times two processes, each with half of a batch: the gradients of two whole batches.

    Neither an evaluation between the steps nor another length takes gradients away.
    """
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    data = mesh["data"]

    def wrap(model: nn.Module) -> nn.Module:
        if kind == "ddp":
            return nn.parallel.DistributedDataParallel(model, process_group=data.get_group())
        for layer in model.model.layers:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=data)
        return fully_shard(model, mesh=data)

    model = model_of(case)
    pipeline = pipeline_of(case, model.state_dict(), model.config, wrap, mesh["pipeline"].get_group())
    place = data.get_local_rank()
    for length in (_LENGTH, _LENGTH + 3):
        batches = [batch_of(case, length, seed) for seed in (1, 2)]
        losses = [expected_loss(model, case, batch) for batch in batches]
        check_loss(pipeline.step(**batches[place]), losses[place], pipeline, 1e-12)
        check_loss(pipeline.evaluate(**batches[place]), losses[place], pipeline, 1e-12)
        check_nothing_is_left(pipeline)
    for parameter in model.parameters():
        if parameter.grad is not None:
            # Each half is divided by its own number of labels, which is the same; both wrappers take means.
            parameter.grad /= 2
    check_gradients(pipeline, model, 1e-12)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(pipeline.clip_grad_norm(0.1), norm, rtol=1e-11, atol=0)
    check_gradients(pipeline, model, 1e-11)


#: group -> name -> check
GROUPS: dict[str, dict[str, Callable[[], None]]] = {
    "two": {name: partial(check, case) for name, case in TWO_PROCESSES.items()} | {"buffers": check_buffers},
    "all-of-two": {name: partial(check, case) for name, case in ALL_OF_TWO_PROCESSES.items()},
    "four": {name: partial(check, case) for name, case in FOUR_PROCESSES.items()},
    "fsdp2": {name: partial(check_composed, case, "fsdp2") for name, case in COMPOSED.items()},
    "ddp": {name: partial(check_composed, case, "ddp") for name, case in COMPOSED.items()},
}


def run(rank: int, num_processes: int, folder: str, group: str) -> None:
    """Run the cases of a group in one process; the first prints the names of those that all have passed."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_processes)
    for name, check_case in GROUPS[group].items():
        try:
            check_case()
        except BaseException:
            print(f"{name}, rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            # Other processes may be waiting for this one.
            sys.exit(1)
        dist.barrier()
        if rank == 0:
            print(name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    number, home, label = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    Path(home).mkdir(parents=True, exist_ok=True)
    mp.start_processes(run, args=(number, home, label), nprocs=number, start_method="fork")
