"""Communication and memory of tensor parallelism, with the whole depth state in every process and with a part of it.

    python benchmarks/tensor_parallel.py [--processes 2 4] [--output benchmarks/results/tensor_parallel.json]

Units: B T D elements per sublayer, sent by a process in ring collectives (`bus_bytes`), over the passes of the base
model: embedding and decoder, without the head. "state" is the largest depth state, in tensors [B, T, D]. Counts are
exact and depend on shapes only. First, outputs and gradients are compared with those of one process.

"accumulated" is the relative error of the gradient of Qwen3's `q_norm` after one and two backward passes under plain
tensor parallelism: of the stock model in transformers' style, and of ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from bus_bytes import BusElements
from state_bytes import peak_state
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig
from transformers.distributed.configuration_utils import DistributedConfig

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.distributed.token_shard import shard_tokens

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HOSTS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "qwen3_moe": Qwen3MoeConfig(**_SIZES, **_MOE),
}
FIELDS: dict[str, Any] = {"sublayers_per_block": 1}
BATCH_SIZE, LENGTH = 1, 512
TOLERANCE = 1e-5


def tensor_parallel(folder: str) -> Any:
    """Load a checkpoint with the plan of its host, in all processes."""
    config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()


def saved(model: Any, folder: str) -> Any:
    """Save a model in one process for all."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return model


def whole(tensor: Any) -> Tensor:
    """Return all of a sharded tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest entry, or to 1e-3 if all are smaller."""
    return ((whole(actual) - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


def step(model: Any, ids: Tensor) -> dict[str, float]:
    """Return what one step of the base model sends, and the size of its state; its gradients stay."""
    unit = ids.numel() * model.config.hidden_size
    num_sublayers = 2 * model.config.num_hidden_layers
    model.zero_grad()
    cotangent = torch.linspace(-1, 1, unit).view(*ids.shape, -1)
    with BusElements() as bus, peak_state(model) as peak:
        output = model.model(input_ids=ids, use_cache=False).last_hidden_state
        forward = bus.count
        output.backward(cotangent)
    passes = {"forward": forward / unit / num_sublayers, "training": bus.count / unit / num_sublayers}
    return passes | {"state": peak.num_bytes / unit / output.element_size()}


def check_parity(name: str, model: Any, expected: dict[str, Tensor]) -> None:
    """Compare the gradients of a step with those of one process."""
    for key, parameter in model.named_parameters():
        if parameter.grad is not None and (error := relative_error(parameter.grad, expected[key])) > TOLERANCE:
            raise AssertionError(f"{name}: the gradient of {key} differs by {error:.1e}")


def measure_host(host: str, folder: str) -> dict[str, Any]:
    """Return the row of a host: what plain and token-sharded tensor parallelism send and keep."""
    torch.manual_seed(0)
    model: Any = DepthAttnForCausalLM(DepthAttnConfig(text_config=copy.deepcopy(HOSTS[host]), **FIELDS)).train()
    nn.init.normal_(model.model.depth_reads.query, std=0.3)
    ids = torch.randint(_SIZES["vocab_size"], (BATCH_SIZE, LENGTH))
    alone = step(saved(model, f"{folder}/{host}"), ids)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    parallel = tensor_parallel(f"{folder}/{host}")
    plain = step(parallel, ids)
    check_parity(f"{host}, plain", parallel, expected)
    shard_tokens(parallel)
    sharded = step(parallel, ids)
    check_parity(f"{host}, sharded", parallel, expected)
    assert alone["training"] == 0
    return {"host": host, "plain": plain, "sharded": sharded}


def measure_accumulated(folder: str) -> dict[str, list[float]]:
    """Return the error of an accumulated gradient after one and two passes, of the stock host and of ours."""
    torch.manual_seed(0)
    config = Qwen3Config(**_SIZES)
    ours = DepthAttnForCausalLM(DepthAttnConfig(text_config=copy.deepcopy(config), **FIELDS)).train()
    models: dict[str, Any] = {"transformers": transformers.Qwen3ForCausalLM(config).train(), "depthattn": ours}
    ids = torch.randint(_SIZES["vocab_size"], (2, 16))
    errors: dict[str, list[float]] = {}
    for name, model in models.items():
        saved(model, f"{folder}/{name}")
        parallel = tensor_parallel(f"{folder}/{name}")
        errors[name] = []
        for _ in range(2):
            for each in (model, parallel):
                each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            weights = [each.model.layers[0].self_attn.q_norm.weight for each in (parallel, model)]
            errors[name].append(relative_error(*(weight.grad for weight in weights)))
    return errors


def measure(folder: str) -> dict[str, Any]:
    """Return the result for the processes of the default group."""
    rows = [measure_host(host, folder) for host in HOSTS]
    return {"processes": dist.get_world_size(), "rows": rows, "accumulated": measure_accumulated(folder)}


def _process(rank: int, num_processes: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dist.init_process_group("gloo")
    result = measure(folder)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def run(num_processes: int) -> dict[str, Any]:
    """Return the result for a number of processes, which are started here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (num_processes, port, folder), nprocs=num_processes)
        return json.loads(Path(folder, "result.json").read_text())


def table(results: list[dict[str, Any]]) -> str:
    """Return the table of docs/tensor_parallel.md.

    Args:
        results: the results for each number of processes.
    """
    lines = ["| processes | host | tensor parallelism | forward | training | state |", "|---|---|---|---|---|---|"]
    for result in results:
        for row in result["rows"]:
            for layout, name in (("plain", "plain"), ("sharded", "`shard_tokens`")):
                numbers = " | ".join(f"{row[layout][key]:.2f}" for key in ("forward", "training", "state"))
                lines.append(f"| {result['processes']} | {row['host']} | {name} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark, print the result and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    results = [run(num_processes) for num_processes in arguments.processes]
    print(table(results))
    for result in results:
        print(result["processes"], "processes, error of an accumulated gradient:", result["accumulated"])
    if arguments.output is not None:
        setting = {**_SIZES, **FIELDS, "batch_size": BATCH_SIZE, "sequence_length": LENGTH}
        versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
        result = {"benchmark": "tensor_parallel", "versions": versions, "setting": setting, "results": results}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
