"""Models with a depth state that is divided along tokens, beside the same model in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from connection_cases import CASES
from gpu_suite_tools import module
from model_checks import depth_model, randomise_depth, relative_max_error
from tiny_hosts import random_ids, tiny_stock_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from hf_depthattn.distributed.token_shard import shard_tokens

BusElements, peak_state = module("bus_bytes").BusElements, module("state_bytes").peak_state

BLOCK = {"sublayers_per_block": 2, "read_scale": "sum"}
FULL = {"sublayers_per_block": 1}
MODA = {**BLOCK, "depth_kv": "attention+mlp", "depth_gate": "head", "depth_slots": [[], [0, 1], [1, 2]]}
LENGTH = 12
# Twice the largest error in float32, which is that of plain tensor parallelism.
TOLERANCE = 4e-5


class Pair:
    """A model in one process, and the same model on all of them.

    Args:
        folder: folder for the checkpoint.
        model_type: the host.
        sharded: whether the tokens are sharded.
        fsdp_size: number of processes among which FSDP2 shards whole layers; tensor parallelism has the others.
        **fields: fields of the config.
    """

    def __init__(self, folder: str, model_type: str, *, sharded: bool = True, fsdp_size: int = 1, **fields):
        torch.manual_seed(0)
        # An even vocabulary: transformers 5.17 refuses to share an odd one between two processes.
        sizes = {"vocab_size": 100, "num_attention_heads": 4, "num_key_value_heads": 4}
        self.alone = depth_model(tiny_stock_model(model_type, **sizes), **fields)
        randomise_depth(self.alone)
        self.alone.set_attn_implementation("eager")
        if dist.get_rank() == 0:
            self.alone.save_pretrained(f"{folder}/model")
        dist.barrier()
        config = DistributedConfig(tp_size=dist.get_world_size() // fsdp_size, fsdp_size=fsdp_size, tp_plan="auto")
        self.parallel = AutoModelForCausalLM.from_pretrained(
            f"{folder}/model", distributed_config=config, attn_implementation="eager"
        )
        dist.barrier()
        if sharded:
            shard_tokens(self.parallel)
        torch.manual_seed(1)

    def train(self) -> None:
        for model in (self.alone, self.parallel):
            model.train()

    def check_logits(self, ids: Tensor) -> None:
        with torch.no_grad():
            logits = [model(ids).logits for model in (self.parallel, self.alone)]
        assert relative_max_error(*logits) < 1e-5

    def check_gradients(self, ids: Tensor, num_passes: int = 2) -> None:
        """All gradients after some backward passes without a step between them."""
        for model in (self.alone, self.parallel):
            model.zero_grad()
            for _ in range(num_passes):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found = dict(self.parallel.named_parameters())
        for name, parameter in self.alone.named_parameters():
            assert (parameter.grad is None) == (found[name].grad is None), name
            if parameter.grad is None:
                continue
            grad = found[name].grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            error = (grad - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-3)
            assert error < TOLERANCE, (name, error)


def check_model(
    folder: str,
    model_type: str,
    *,
    checkpointed: bool = False,
    sharded: bool = True,
    double: bool = False,
    **fields,
) -> None:
    """Logits, and gradients accumulated over two passes; also with a number of tokens that cannot be divided."""
    pair = Pair(folder, model_type, sharded=sharded, **fields)
    if double:
        # The terms of a scalar's gradient nearly cancel.
        pair.alone.double()
        pair.parallel.double()
    pair.check_logits(random_ids(2, LENGTH))
    # Gradients without dropout, but with checkpoints, which layers use in training only.
    if checkpointed:
        pair.train()
        pair.parallel.gradient_checkpointing_enable()
    pair.check_gradients(random_ids(2, LENGTH))
    if not checkpointed:
        pair.check_gradients(random_ids(1, LENGTH - 1), num_passes=1)


def check_traffic(folder: str) -> None:
    """The output of sublayers is scattered, their input gathered, and the gradient of the input scattered once."""
    pair = Pair(folder, "llama", **FULL)
    layers = len(pair.parallel.model.layers)
    with BusElements() as bus:
        hidden = pair.parallel.model(random_ids(1, LENGTH), use_cache=False).last_hidden_state
        # Later versions of transformers shard the embedding, and all-reduce its output.
        assert bus.calls.pop("all_reduce", 0) <= 1
        # One more gather for the final norm.
        assert bus.calls == {"all_gather_into_tensor": 2 * layers + 1, "reduce_scatter_tensor": 2 * layers}
        bus.calls.clear()
        hidden.sum().backward()
    # Parameters of each layer and of all reads; the embeddings' gradient is gathered.
    assert bus.calls == {
        "allreduce": layers + 1,
        "all_gather_into_tensor": 2 * layers + 1,
        "reduce_scatter_tensor": 2 * layers,
    }


def check_memory(folder: str) -> None:
    """The state is divided by the number of processes, with one sequence, with several, and in chunks."""
    pair = Pair(folder, "llama", **FULL)
    for batch_size, options in ((1, {}), (3, {}), (1, {"prefill_chunk_size": 4})):
        ids = random_ids(batch_size, LENGTH)
        peaks = []
        for model in (pair.alone, pair.parallel):
            with peak_state(model) as peak:
                model.generate(ids, max_new_tokens=1, **options)
            peaks.append(peak.num_bytes)
        assert peaks[0] == peaks[1] * dist.get_world_size(), (batch_size, options, peaks)


def check_generation(folder: str) -> None:
    """The same tokens, with a cache, left padding, and chunks that can and cannot be divided."""
    pair = Pair(folder, "qwen3", **MODA)
    ids = random_ids(2, LENGTH)
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    for mask in (torch.ones_like(ids), padded):
        for options in ({}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 5}, {"use_cache": False}):
            options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
            alone, parallel = (model.generate(ids, **options) for model in (pair.alone, pair.parallel))
            assert torch.equal(alone, parallel), options


def check_records(folder: str) -> None:
    """Recorded hidden states and weights of reads have all tokens."""
    pair = Pair(folder, "llama", **BLOCK)
    ids = random_ids(1, LENGTH)
    with torch.no_grad():
        alone, parallel = (
            model(ids, output_hidden_states=True, output_depth_attentions=True)
            for model in (pair.alone, pair.parallel)
        )
        asked_by_config = pair.parallel.config
        asked_by_config.output_hidden_states = True
        states = pair.parallel(ids).hidden_states
    for key in ("hidden_states", "depth_attentions"):
        for actual, expected in zip(parallel[key], alone[key], strict=True):
            torch.testing.assert_close(actual, expected)
    assert states[1].shape == alone.hidden_states[1].shape


def check_saved(folder: str) -> None:
    """A checkpoint of a sharded model has the weights of the model, and loads in one process."""
    pair = Pair(folder, "llama", **BLOCK)
    pair.parallel.save_pretrained(f"{folder}/saved")
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/saved").state_dict()
    for name, tensor in pair.alone.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def check_refusals(folder: str) -> None:
    """Models that are sharded already or not parallel."""
    pair = Pair(folder, "llama", **BLOCK)
    with pytest.raises(ValueError, match="sharded already"):
        shard_tokens(pair.parallel)
    with pytest.raises(ValueError, match="not tensor-parallel"):
        shard_tokens(pair.alone)
    if find_spec("peft") is None:
        return
    # Before and after sharding.
    from peft import LoraConfig, inject_adapter_in_model

    plain = Pair(f"{folder}/plain", "llama", sharded=False, **BLOCK)
    for model in (plain.parallel, pair.parallel):
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(ValueError, match="does not support PEFT adapters, which LlamaAttention has in q_proj"):
        shard_tokens(plain.parallel)
    ids = random_ids(2, LENGTH)
    with pytest.raises(ValueError, match="does not support PEFT adapters, which LlamaAttention has in q_proj"):
        pair.parallel(input_ids=ids, labels=ids, use_cache=False)


def check_autocast(folder: str) -> None:
    """Under autocast the loss is that of one process up to the rounding of bfloat16."""
    pair = Pair(folder, "llama", **BLOCK)
    ids = random_ids(2, LENGTH)
    losses = []
    for model in (pair.alone, pair.parallel):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


#: name -> check
CHECKS: dict[str, Callable[[str], None]] = {
    "llama": partial(check_model, model_type="llama", **BLOCK),
    "checkpointed": partial(check_model, model_type="llama", checkpointed=True, **FULL),
    "qwen3-moda": partial(check_model, model_type="qwen3", **MODA),
    "plain-value-residual": partial(
        check_model, model_type="qwen3", sharded=False, double=True, connection="residual", value_residual=True
    ),
    "traffic": check_traffic,
    "memory": check_memory,
    "generation": check_generation,
    "refusals": check_refusals,
    "fsdp2": partial(check_model, model_type="llama", fsdp_size=2, **BLOCK),
    "fsdp2-moda": partial(check_model, model_type="qwen3", fsdp_size=2, **MODA),
    **{
        host: partial(check_model, model_type=host, **FULL)
        for host in ("gemma2", "olmo2", "phi3", "gpt_oss", "deepseek_v3", "granitemoeshared", "qwen3_5_text")
    },
    **{f"connection {case}": partial(check_model, model_type="llama", **fields) for case, fields in CASES.items()},
    "input query": partial(check_model, model_type="llama", query="input", **BLOCK),
    "static mix": partial(check_model, model_type="llama", static_mix=True, **BLOCK),
    "value residual": partial(check_model, model_type="qwen3", double=True, value_residual=True, **MODA),
    "moda-reader": partial(check_model, model_type="qwen3", depth_key_norm="reader", **MODA),
    "qwen3_moe": partial(check_model, model_type="qwen3_moe", **BLOCK),
    "autocast": check_autocast,
    "records": check_records,
    "saved": check_saved,
}
#: The checks of `make test`.
QUICK = [
    "llama",
    "checkpointed",
    "qwen3-moda",
    "plain-value-residual",
    "traffic",
    "memory",
    "generation",
    "refusals",
]
#: Checks for four processes only.
OF_FOUR = ["fsdp2", "fsdp2-moda"]
