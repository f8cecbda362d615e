"""Models in torch's `context_parallel`: parts of the tokens in two processes, beside all tokens in one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate.big_modeling import _attach_context_parallel_hooks
from cpu_ring import RING, cpu_ring, set_rotate_method
from model_checks import depth_model, randomise_depth
from tiny_hosts import random_ids, tiny_stock_model
from torch import Tensor, nn
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.functional import pad
from two_processes import MODELS, Check, check_equal, gradients, without_folder

NUM_TOKENS = 16
MODA = {"sublayers_per_block": 2, "depth_kv": "attention+mlp", "depth_slots": [[], [0, 1], [1, 2]]}
#: label -> fields of the config
CASES = {
    **MODELS,
    "moda-no-rope": {**MODA, "depth_key_rope": "none"},
    "moda-no-gate": MODA,
}


def model_of(label: str, **host_fields) -> nn.Module:
    """The same model in every process, in float64."""
    torch.manual_seed(0)
    model = depth_model(tiny_stock_model("llama", **host_fields), **CASES[label]).train()
    randomise_depth(model)
    return model.double()


@contextmanager
def split(ids: Tensor) -> Iterator[dict[str, Tensor]]:
    """This process's part of a batch, in torch's order, as Trainer prepares it."""
    batch = {
        "input_ids": ids.clone(),
        "position_ids": torch.arange(ids.shape[1]).expand(ids.shape[0], -1).contiguous(),
        "shift_labels": pad(ids, (0, 1), value=-100)[:, 1:].contiguous(),
    }
    buffers = list(batch.values())
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    dims = [1] * len(buffers)
    with cpu_ring(), context_parallel(mesh, buffers=buffers, buffer_seq_dims=dims, no_restore_buffers={*buffers}):
        # `labels` only say that a loss is wanted; its targets are `shift_labels`, and its mean is that of the batch.
        yield {**batch, "labels": batch["input_ids"], "num_items_in_batch": ids.numel() - ids.shape[0]}


def prepared(model: nn.Module) -> nn.Module:
    """A copy whose attention gets no mask, as accelerate prepares it."""
    model = copy.deepcopy(model)
    _attach_context_parallel_hooks(model)
    return model


def check_gradients(
    label: str, *, checkpointed: bool = False, balanced: bool = True, rotation: str = "allgather"
) -> None:
    """Half of the tokens in each process: the loss and every gradient are those of the whole sequence."""
    plain, ids = model_of(label), random_ids(2, NUM_TOKENS)
    expected_loss, expected = gradients(plain, ids)
    model = prepared(plain)
    model.zero_grad()
    if checkpointed:
        model.gradient_checkpointing_enable()
    set_rotate_method(rotation)
    RING._cp_options.enable_load_balance = balanced
    try:
        with split(ids) as batch:
            loss = model(**batch, use_cache=False).loss
            loss.backward()
    finally:
        RING._cp_options.enable_load_balance = True
    loss = loss.detach()
    dist.all_reduce(loss)
    # The loss is float32.
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for grad in found.values():
        dist.all_reduce(grad)
    check_equal(found, expected, 1e-12)


#: name -> check
CHECKS: dict[str, Check] = {
    **{label: without_folder(check_gradients, label) for label in CASES},
    "moda-checkpointed": without_folder(check_gradients, "moda", checkpointed=True),
    "moda-in-order": without_folder(check_gradients, "moda", balanced=False),
    "moda-all-to-all": without_folder(check_gradients, "moda", rotation="alltoall"),
}
