"""Short trainings with `Trainer`, in one process or as engines for several run them, from equal weights and batches.

    python trainer_runs.py FOLDER NAME...        started by `accelerate launch` or `torchrun`

Every process trains; the first writes the parameters to `FOLDER/NAME.pt`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from moda_models import moda_model
from torch import Tensor, nn
from training_models import rows, train
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_depthattn.integrations.peft import lora_config
from hf_depthattn.integrations.trainer import depth_optimizer_cls_and_kwargs

NUM_STEPS, SAVED_STEP, BATCH_SIZE, LENGTH = 4, 2, 8, 16


class Run(NamedTuple):
    """A training.

    Attributes:
        engine: `"ddp"`, `"fsdp2"`, `"launcher"` (FSDP2 by arguments of `accelerate launch`), `"cp"` (context
            parallelism, with FSDP2), `"zero2"` or `"zero3"` (DeepSpeed).
        lora: LoRA on the host, with all depth parameters.
        state_dict: how FSDP2 saves checkpoints.
        is_checkpointed: gradient checkpointing.
    """

    engine: str
    lora: bool = False
    state_dict: str = "FULL_STATE_DICT"
    is_checkpointed: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return arguments of Trainer that turn the engine on."""
        arguments: dict[str, Any] = {"gradient_checkpointing": self.is_checkpointed}
        if self.engine in ("ddp", "launcher"):
            return arguments
        if self.engine.startswith("zero"):
            stage = int(self.engine.removeprefix("zero"))
            zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
            sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
            # AdamW of torch, as in one process; DeepSpeed's own for CPUs would be compiled first.
            torch_adam = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
            return arguments | {"deepspeed": {"zero_optimization": zero, **dict.fromkeys(sizes, "auto"), **torch_adam}}
        wrapped = {"transformer_layer_cls_to_wrap": "DepthAttnDecoderLayer", "state_dict_type": self.state_dict}
        arguments |= {"fsdp": True, "fsdp_config": {"version": 2, **wrapped}}
        if self.engine == "cp":
            from accelerate.parallelism_config import ParallelismConfig

            arguments["parallelism_config"] = ParallelismConfig(cp_size=2)
        return arguments


#: name -> training
RUNS = {
    "ddp": Run("ddp", is_checkpointed=True),
    "ddp-lora": Run("ddp", lora=True),
    "fsdp2-full": Run("fsdp2", is_checkpointed=True),
    "fsdp2-sharded": Run("fsdp2", state_dict="SHARDED_STATE_DICT"),
    "fsdp2-lora": Run("fsdp2", lora=True),
    "fsdp2-launcher": Run("launcher"),
    "cp": Run("cp"),
    "zero2": Run("zero2", is_checkpointed=True),
    "zero3": Run("zero3"),
}


def model_of(run: Run) -> nn.Module:
    """The same model in every process: AttnRes, MoDA with gates and a value residual."""
    torch.manual_seed(0)
    fields = {"sublayers_per_block": 2, "read_scale": "sum", "value_residual": True}
    model: nn.Module = moda_model(connection="attn_res", **fields)
    if run.lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(model, r=2))
    return model


def trained(run: Run, folder: Path, *, num_processes: int, resume: str | None = None) -> Trainer:
    """Train for `NUM_STEPS` steps of two batches, and save after `SAVED_STEP`.

    Args:
        run: the training.
        folder: output folder of Trainer.
        num_processes: number of processes that share a batch.
        resume: checkpoint to resume from.
    """
    return train(
        model_of(run),
        folder,
        rows(64, LENGTH),
        optimizer=depth_optimizer_cls_and_kwargs,
        steps=NUM_STEPS,
        resume=resume,
        per_device_train_batch_size=BATCH_SIZE // num_processes,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=SAVED_STEP,
        # Without it, Adam would make equal steps of gradients that are rounding errors.
        adam_epsilon=1e-3,
        **(run.arguments() if num_processes > 1 or run.engine == "cp" else {}),
    )


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, gathered, by the names of the model without wrappers."""
    found = {}
    for name, parameter in model.named_parameters():
        gathered = contextlib.nullcontext()
        if hasattr(parameter, "ds_id"):
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters([parameter])
        with gathered:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")] = whole.detach().clone()
    return found


@contextlib.contextmanager
def fsdp_on_cpus():
    """Let accelerate use FSDP2 on a CPU, which it offers on accelerators only."""
    init = PartialState.__init__

    def as_accelerators(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    with patch.object(PartialState, "__init__", as_accelerators):
        yield


def trained_parameters(run: Run, folder: Path, resume: str | None = None) -> dict[str, Tensor]:
    """Train in two processes and return the parameters."""
    with contextlib.ExitStack() as stack:
        if run.engine in ("fsdp2", "launcher", "cp"):
            stack.enter_context(fsdp_on_cpus())
        if run.engine == "cp":
            from cpu_ring import cpu_ring

            stack.enter_context(cpu_ring())
        # In context parallelism, both processes have the whole batch and half of the tokens.
        trainer = trained(run, folder, num_processes=1 if run.engine == "cp" else 2, resume=resume)
        assert trainer.args.world_size == 2
        found = parameters(trainer.model)
    # Otherwise ZeRO-3 would also split the next model while it is built.
    unset_hf_deepspeed_config()
    return found


def main() -> None:
    """Train every named run, and train its second half again from the checkpoint of the first."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        expected = trained_parameters(RUNS[name], folder / name)
        # A resumed run differs under ZeRO-3, on a stock Llama too. accelerate 1.10 calls the device of a process
        # "cpu:0", and Trainer cannot load optimizers to it.
        if name != "zero3" and PartialState().device.index is None:
            checkpoint = str(folder / name / f"checkpoint-{SAVED_STEP}")
            resumed = trained_parameters(RUNS[name], folder / f"{name}-resumed", checkpoint)
            for key, parameter in expected.items():
                torch.testing.assert_close(resumed[key], parameter, rtol=1e-6, atol=1e-7, msg=key)
        if os.environ["RANK"] == "0":
            torch.save(expected, folder / f"{name}.pt")
            print("trained", name, flush=True)


if __name__ == "__main__":
    main()
