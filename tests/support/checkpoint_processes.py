"""Checkpoints of pipeline stages on several gloo processes.

    python checkpoint_processes.py NUM_PROCESSES FOLDER GROUP

As pipeline_processes.py, which starts the processes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pipeline_processes
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from pipeline_cases import BOTH, FULL, MOE, TIED, Case
from pipeline_processes import batch_of, expected_loss, model_of, pipeline_of, prepared
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_depthattn import lora_config
from hf_depthattn.checkpoints.checkpoint_files import read_weight_files
from hf_depthattn.distributed.pipeline import DepthPipeline, build_pipeline
from hf_depthattn.distributed.stage_building import stage_from_config
from hf_depthattn.distributed.stage_checkpoint import save_pipeline
from hf_depthattn.distributed.stage_plan import loop_ranks, plan_stages, split_layers
from hf_depthattn.distributed.training_state import load_training_state, save_training_state
from hf_depthattn.errors import UserError

if find_spec("peft"):
    import peft

SAVED = {
    "both": Case("Interleaved1F1B", BOTH, dtype=torch.float32),
    "MoE": Case("1F1B", FULL, dtype=torch.float32, **MOE),
    "tied": Case("Interleaved1F1B", FULL, dtype=torch.float32, **TIED),
}
#: Before and after the interruption: other schedules, other stages.
RESUMED = {
    "both": (Case("Interleaved1F1B", BOTH), Case("GPipe", BOTH)),
    "tied": (Case("1F1B", FULL, **TIED), Case("ZBVZeroBubble", FULL, **TIED)),
}
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def common_folder() -> Path:
    """A new folder that all processes know."""
    values = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values)
    return Path(str(values[0]))


def optimizer_of(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def on_two_by_two(case: Case) -> tuple[PreTrainedModel, DepthPipeline]:
    """The whole model, and its stages on two ranks of the pipeline, each sharded over two processes."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))

    def wrap(model: nn.Module) -> nn.Module:
        for layer in model.model.layers:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])

    model = model_of(case)
    return model, pipeline_of(case, model.state_dict(), model.config, wrap, mesh["pipeline"].get_group())


def in_stages(case: Case) -> tuple[PreTrainedModel, DepthPipeline]:
    """The whole model, and its stages on all processes."""
    model = model_of(case)
    return model, pipeline_of(case, model.state_dict(), model.config)


def check_saved(case: Case, build: Callable = in_stages) -> None:
    """One folder as the whole model would write it, but for the number of files; it loads with the same logits."""
    model, pipeline = build(case)
    folder = common_folder()
    save_pipeline(pipeline, folder / "stages")
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "whole")
        found, expected = (read_weight_files(folder / name) for name in ("stages", "whole"))
        assert found.weight_map.keys() == expected.weight_map.keys()
        tensors = [name for shard in found.shards for name in shard.tensors]
        assert len(set(tensors)) == len(tensors)
        names = {path.name for path in (folder / "stages").iterdir() if "safetensors" not in path.name}
        assert names == {path.name for path in (folder / "whole").iterdir() if "safetensors" not in path.name}
        cards = [(folder / name / "README.md").read_text().replace(name, "") for name in ("stages", "whole")]
        assert cards[0] == cards[1]
        assert [path.name for path in folder.iterdir() if path.name not in ("stages", "whole")] == []
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder / "stages", dtype=case.dtype, output_loading_info=True, experts_implementation="eager"
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        ids = batch_of(case)["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)
    dist.barrier()


def check_small_shards() -> None:
    """A stage may have several files; they are numbered over all stages."""
    _, pipeline = in_stages(Case("Interleaved1F1B", FULL, dtype=torch.float32))
    folder = common_folder() / "model"
    save_pipeline(pipeline, folder, max_shard_size="20KB")
    names = sorted(shard.path.name for shard in read_weight_files(folder).shards)
    assert len(names) > 4
    assert names == [f"model-{number:05d}-of-{len(names):05d}.safetensors" for number in range(1, len(names) + 1)]
    dist.barrier()


def check_adapter() -> None:
    """LoRA in the stages trains as in the whole model, and is saved as PEFT saves it there; it can be overwritten."""
    case = Case("Interleaved1F1B", FULL)
    model, folder = model_of(case), common_folder()
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "host")
    dist.barrier()
    config = lora_config(model, r=2, init_lora_weights=False)
    whole = peft.get_peft_model(model, config)

    def adapt(stage: nn.Module) -> nn.Module:
        peft.inject_adapter_in_model(config, prepared(stage, case))
        adapter = {name.removeprefix("base_model.model."): tensor for name, tensor in whole.state_dict().items()}
        stage.load_state_dict({name: adapter[name] for name in stage.state_dict()})
        return stage

    pipeline = build_pipeline(folder / "host", case.schedule, num_microbatches=2, device="cpu", parallelize=adapt)
    optimizer, whole_optimizer = optimizer_of(pipeline.parameters()), optimizer_of(whole.parameters())
    for seed in (1, 2):
        loss = trained(pipeline, optimizer, case, seed)
        expected = trained_whole(whole, whole_optimizer, case, seed)
        check_same_loss(loss, expected)
    for overwrite in (False, True):
        save_pipeline(pipeline, folder / "adapter", overwrite=overwrite)
    if dist.get_rank() == 0:
        whole.save_pretrained(folder / "whole")
        found, wanted = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "whole"))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, msg=name)
        assert sorted(os.listdir(folder / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
        # It names the checkpoint of the host.
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").double()
        ids = batch_of(case)["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, whole.eval()(ids).logits, rtol=1e-6, atol=1e-6)
    dist.barrier()


def check_lost_parameters() -> None:
    """Parameters that are trained beside the adapter, in one of the stages, are not lost silently."""
    config = model_of(Case("1F1B", FULL)).config

    def with_norm(stage: nn.Module) -> nn.Module:
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), stage)
        if dist.get_rank() == 1:
            stage.model.norm.requires_grad_(True)
        return stage

    def only_first(stage: nn.Module) -> nn.Module:
        if dist.get_rank() == 0:
            peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), stage)
        return stage

    folder = common_folder()
    for adapt, lost in (with_norm, "model.norm.weight"), (only_first, "tensors, first model.layers.2."):
        pipeline = build_pipeline(config, "1F1B", num_microbatches=2, device="cpu", parallelize=adapt)
        with refused(f"{lost}: would be lost" if adapt is with_norm else lost):
            save_pipeline(pipeline, folder / "model")
    assert os.listdir(folder) == []
    dist.barrier()


@contextmanager
def refused(message: str):
    """Every process gets the error."""
    try:
        yield
    except UserError as error:
        assert message in str(error), error
        return
    raise AssertionError(f"no error: {message}")


def check_errors() -> None:
    """An error of one process is raised in all, and leaves nothing behind."""
    _, pipeline = in_stages(Case("1F1B", FULL))
    folder = common_folder()
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "file").touch()
    with refused("taken: exists and is not empty"):
        save_pipeline(pipeline, folder / "taken")

    def fail(*args, **kwargs):
        raise OSError("no space left")

    failing = patch.object(PreTrainedModel, "save_pretrained", fail) if dist.get_rank() == 1 else patch.dict({}, {})
    with failing, refused("stage 1: no space left"):
        save_pipeline(pipeline, folder / "model")
    assert os.listdir(folder) == ["taken"], os.listdir(folder)
    dist.barrier()
    optimizer = optimizer_of(pipeline.parameters())
    with refused("no complete checkpoint"):
        load_training_state(pipeline, optimizer, folder / "taken")
    save_training_state(pipeline, optimizer, folder / "state", step=1)
    with refused("state: has a state already"):
        save_training_state(pipeline, optimizer, folder / "state", step=1)
    # Only the second process finds it out.
    other = optimizer if dist.get_rank() == 0 else torch.optim.SGD(pipeline.parameters())
    with refused("is of another optimizer than SGD"):
        load_training_state(pipeline, other, folder / "state")
    save_pipeline(pipeline, folder / "model")
    with refused("exists and is not empty"):
        save_pipeline(pipeline, folder / "model")
    save_pipeline(pipeline, folder / "model", overwrite=True)


def trained(pipeline: DepthPipeline, optimizer: torch.optim.Optimizer, case: Case, seed: int) -> Tensor | None:
    """Make a step, and return its loss."""
    loss = pipeline.step(**batch_of(case, seed=seed))
    optimizer.step()
    optimizer.zero_grad()
    return loss


def trained_whole(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case, seed: int) -> Tensor:
    """The same with the whole model."""
    loss = expected_loss(model, case, batch_of(case, seed=seed))
    optimizer.step()
    optimizer.zero_grad()
    return loss


def check_same_loss(loss: Tensor | None, expected: Tensor) -> None:
    if loss is not None:
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def check_resumed(before: Case, after: Case, build: Callable = in_stages) -> None:
    """Interrupted after two steps, training goes on in other stages and in the whole model as without interruption."""
    model, pipeline = build(before)
    optimizer, whole_optimizer = optimizer_of(pipeline.parameters()), optimizer_of(model.parameters())
    for seed in (1, 2):
        trained(pipeline, optimizer, before, seed)
        trained_whole(model, whole_optimizer, before, seed)
    of_stages, of_whole = common_folder(), common_folder()
    save_training_state(pipeline, optimizer, of_stages, step=2)
    if dist.get_rank() == 0:
        # By torch's own functions, as a training without a pipeline does it.
        tensors, states = get_state_dict(model, whole_optimizer, options=_FLAT)
        dcp.save({"model": tensors, "optimizer": states, "step": 2}, checkpoint_id=of_whole, no_dist=True)
    dist.barrier()
    losses = [trained_whole(model, whole_optimizer, before, seed) for seed in (3, 4)]

    for folder in (of_stages, of_whole):
        fresh, resumed = build(after)
        optimizer = optimizer_of(resumed.parameters())
        optimizer.param_groups[0]["lr"] = 1.0
        assert load_training_state(resumed, optimizer, folder) == 2
        assert optimizer.param_groups[0]["lr"] == 1e-3
        for seed, loss in zip((3, 4), losses, strict=True):
            check_same_loss(trained(resumed, optimizer, after, seed), loss)

    whole_optimizer = optimizer_of(fresh.parameters())
    tensors, states = get_state_dict(fresh, whole_optimizer, options=_FLAT)
    state = {"model": tensors, "optimizer": states, "step": 0}
    dcp.load(state, checkpoint_id=of_stages, no_dist=True)
    set_state_dict(
        fresh, whole_optimizer, model_state_dict=tensors, optim_state_dict=state["optimizer"], options=_FLAT
    )
    assert state["step"] == 2
    for seed, loss in zip((3, 4), losses, strict=True):
        check_same_loss(trained_whole(fresh, whole_optimizer, after, seed), loss)


def check_sharded_stage() -> None:
    """Each process in turn saves a stage that is sharded over both."""
    config = model_of(Case("1F1B", BOTH, dtype=torch.float32)).config
    plan = plan_stages(config, split_layers(4, 2), loop_ranks(2, 1))[1]
    stage = stage_from_config(config, plan, seed=0)
    expected = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in stage.model.layers[2:]:
        fully_shard(layer, mesh=mesh)
    fully_shard(stage, mesh=mesh)
    for writer in (0, 1):
        folder = common_folder()
        is_writer = dist.get_rank() == writer
        stage.save_pretrained(folder, is_main_process=is_writer)
        if is_writer:
            saved = load_file(folder / "model.safetensors")
            assert saved.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0)
        dist.barrier()


def check_sharded_model() -> None:
    """A whole model that is sharded over both processes has the files of the plain one, with tied weights once."""
    model = model_of(Case("1F1B", FULL, dtype=torch.float32, **TIED))
    folder = common_folder()
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "plain")
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.save_pretrained(folder / "sharded")
    dist.barrier()
    plain, sharded = (load_file(folder / name / "model.safetensors") for name in ("plain", "sharded"))
    assert sharded.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=0, atol=0)
    dist.barrier()


ADAPTERS: dict[str, Callable[[], None]] = (
    {"adapter": check_adapter, "lost parameters": check_lost_parameters} if find_spec("peft") else {}
)
GROUPS: dict[str, dict[str, Callable[[], None]]] = {
    "two": {
        "saved": partial(check_saved, SAVED["both"]),
        "resumed": partial(check_resumed, *RESUMED["both"]),
        "errors": check_errors,
        **ADAPTERS,
        "sharded stage": check_sharded_stage,
        "sharded model": check_sharded_model,
    },
    "all-of-two": {
        **{f"saved, {name}": partial(check_saved, case) for name, case in SAVED.items()},
        **{f"resumed, {name}": partial(check_resumed, *cases) for name, cases in RESUMED.items()},
        "small shards": check_small_shards,
    },
    "four": {
        "saved": partial(check_saved, Case("Interleaved1F1B", BOTH, num_layers=8, dtype=torch.float32)),
        "resumed": partial(
            check_resumed,
            Case("Interleaved1F1B", BOTH, num_layers=8, num_microbatches=8),
            Case("DualPipeV", BOTH, num_layers=8, num_microbatches=8),
        ),
        "saved, sharded": partial(
            check_saved, Case("Interleaved1F1B", BOTH, dtype=torch.float32, **TIED), on_two_by_two
        ),
        "resumed, sharded": partial(check_resumed, Case("1F1B", BOTH), Case("Interleaved1F1B", BOTH), on_two_by_two),
    },
}


if __name__ == "__main__":
    number, home, label = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    pipeline_processes.GROUPS[label] = GROUPS[label]
    mp.start_processes(pipeline_processes.run, args=(number, home, label), nprocs=number, start_method="fork")
