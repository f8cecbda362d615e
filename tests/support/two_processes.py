"""Models on two gloo processes beside the same model in one: FSDP2, DDP, tensor parallelism, and other files' checks.

    python two_processes.py FOLDER NAME...    with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set

Both processes compute the loss and every gradient of one batch, sharded and not, and compare them. A name is one of
`CHECKS`, or `FILE:NAME` for a check in the table `CHECKS` of another file, some of which are for four processes.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from model_checks import depth_model, randomise_depth
from tiny_hosts import random_ids, tiny_stock_model
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_depthattn import depth_layer

Gradients = dict[str, Tensor]
Check = Callable[[str], None]

#: label -> fields of the config
MODELS = {
    "block": {"sublayers_per_block": 2, "read_scale": "sum"},
    "full": {"sublayers_per_block": 1},
    "moda": {
        "sublayers_per_block": 2,
        "depth_kv": "attention+mlp",
        "depth_kv_bias": True,
        "depth_slots": [[], [0, 1], [1, 2]],
        "depth_gate": "head",
    },
    "value-residual": {"connection": "residual", "value_residual": True},
}


def without_folder(check: Callable[..., None], *args, **kwargs) -> Check:
    """A check with its arguments, that takes the folder and does not use it."""
    return lambda folder: check(*args, **kwargs)


def model_of(label: str, host: str = "llama") -> nn.Module:
    """The same model in every process."""
    torch.manual_seed(0)
    # An even vocabulary: transformers 5.17 refuses to share an odd one between two processes.
    fields = {"vocab_size": 98} | ({"output_router_logits": True} if host == "qwen3_moe" else {})
    model = depth_model(tiny_stock_model(host, **fields), **MODELS[label]).train()
    randomise_depth(model)
    return model


def gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, Gradients]:
    """The loss and every gradient of a batch, sharded ones gathered."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad
        found[name.removeprefix("module.")] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return loss.detach(), found


def check_equal(actual: Gradients, expected: Gradients, tolerance: float) -> None:
    """Each gradient is right to a fraction of its largest entry, or of 1e-3 for one that is nearly zero."""
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        error = (actual[name].float() - grad.float()).abs().max() / grad.float().abs().max().clamp(min=1e-3)
        assert error < tolerance, (name, error)


def check_fsdp2(label: str, *, apart: bool, checkpointed: bool, policy: MixedPrecisionPolicy | None = None) -> None:
    """Layers and root sharded over two processes, the reads in the root's group or in one of their own.

    Under a policy for bfloat16, what the layers get from the reads stays float32.
    """
    plain = model_of(label)
    if checkpointed:
        plain.gradient_checkpointing_enable()
    sharded = copy.deepcopy(plain)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    if apart:
        fully_shard(sharded.model.depth_reads, mesh=mesh, reshard_after_forward=True)
    options = {} if policy is None else {"mp_policy": policy}
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(sharded, mesh=mesh)
    seen: set[torch.dtype] = set()
    read = depth_layer.DepthAttnDecoderLayer._read

    def watched(depth_reads, last_site, recorder, site, state):
        seen.add(depth_reads.value.score_weights.dtype)
        if state.group is not None:
            seen.update(tensor.dtype for tensor in state.group.value.lses)
        return read(depth_reads, last_site, recorder, site, state)

    ids = random_ids(4, 9)
    mine = ids.chunk(dist.get_world_size())[dist.get_rank()]
    expected_loss, expected = gradients(plain, ids)
    with patch.object(depth_layer.DepthAttnDecoderLayer, "_read", staticmethod(watched)):
        loss, found = gradients(sharded, mine)
    assert seen == {torch.float32}, seen
    dist.all_reduce(loss)
    tolerance = 1e-5 if policy is None else 0.1
    torch.testing.assert_close(loss / dist.get_world_size(), expected_loss, rtol=tolerance, atol=0)
    check_equal(found, expected, tolerance)


def check_ddp(label: str) -> None:
    """Each process has half of the batch; the gradients are those of the whole."""
    plain = model_of(label)
    ids = random_ids(4, 9)
    _, expected = gradients(copy.deepcopy(plain), ids)
    _, found = gradients(nn.parallel.DistributedDataParallel(plain), ids.chunk(2)[dist.get_rank()])
    check_equal(found, expected, 1e-5)


def check_loaded(label: str, folder: str, *, host: str = "llama", **options) -> None:
    """A model that transformers distributes: the loss and every gradient of the whole batch.

    Args:
        label: the model, in `MODELS`.
        folder: a folder that both processes share.
        host: the host.
        **options: arguments of `from_pretrained`.
    """
    plain = model_of(label, host)
    saved = f"{folder}/{host}-{label}"
    if dist.get_rank() == 0:
        plain.save_pretrained(saved)
    dist.barrier()
    parallel = AutoModelForCausalLM.from_pretrained(saved, **options).train()
    assert any(hasattr(parameter, "placements") for parameter in parallel.parameters())
    ids = random_ids(4, 9)
    expected_loss, expected = gradients(plain, ids)
    has_own_batch = (options["distributed_config"].fsdp_size or 1) > 1
    loss, found = gradients(parallel, ids.chunk(2)[dist.get_rank()] if has_own_batch else ids)
    if has_own_batch:
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    check_equal(found, expected, 1e-4)


def expert_parallel() -> DistributedConfig:
    """Experts in two processes; the rest by the plan for tensor parallelism, or whole in old versions."""
    if "ep_size" in DistributedConfig.__dataclass_fields__:
        return DistributedConfig(tp_size=2, ep_size=2)
    return DistributedConfig(tp_size=2, enable_expert_parallel=True)


_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
#: name -> check, which gets a folder that both processes share
CHECKS: dict[str, Check] = {
    "fsdp2-block": without_folder(check_fsdp2, "block", apart=False, checkpointed=False),
    "fsdp2-full-apart": without_folder(check_fsdp2, "full", apart=True, checkpointed=False),
    "fsdp2-moda-checkpointed": without_folder(check_fsdp2, "moda", apart=True, checkpointed=True),
    "fsdp2-full-bf16": without_folder(check_fsdp2, "full", apart=False, checkpointed=False, policy=_BF16),
    "ddp-block": without_folder(check_ddp, "block"),
    "ddp-full": without_folder(check_ddp, "full"),
    "ddp-moda": without_folder(check_ddp, "moda"),
    **{
        f"tp-{label}": partial(check_loaded, label, distributed_config=DistributedConfig(tp_size=2))
        for label in MODELS
    },
    "tp-moda-experts": partial(
        check_loaded, "moda", host="qwen3_moe", distributed_config=DistributedConfig(tp_size=2)
    ),
    "ep-moda": lambda folder: check_loaded("moda", folder, host="qwen3_moe", distributed_config=expert_parallel()),
    "fsdp-of-transformers": partial(check_loaded, "moda", distributed_config=DistributedConfig(fsdp_size=2)),
}


def main() -> None:
    """Run the named checks and print each name when its check has passed."""
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    for name in names:
        file, _, check = name.rpartition(":")
        (importlib.import_module(file).CHECKS if file else CHECKS)[check](f"{folder}/{name}")
        print(name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
