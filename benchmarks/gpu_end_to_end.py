"""Whole models in the GPU suite: training and decode steps of a host of Qwen3-0.6B's shape with random weights.

A training step is forward with loss, backward and AdamW. A decode step is one token after a context. The stock model
and ours use the same attention, cache and compile mode: eager with the dynamic cache of transformers, or
`torch.compile` with a static cache (and CUDA graphs for decoding).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gpu_run
import torch
from gpu_timing import Clock, Effort
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, StaticCache

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM, op_dispatch

STOCK = "stock"
#: Row -> fields of `DepthAttnConfig`.
VARIANTS: dict[str, dict | None] = {
    STOCK: None,
    "Block AttnRes, N=8": {"num_blocks": 8},
    "Full AttnRes": {"sublayers_per_block": 1},
    "MoDA": {"connection": "residual", "depth_kv": "attention+mlp"},
    "Block AttnRes, N=8, and MoDA": {"num_blocks": 8, "depth_kv": "attention+mlp"},
}
EAGER, COMPILED = "eager", "torch.compile"
TRAINING, DECODE = "training step", "decode step"
#: Largest relative difference of the loss between our kernels and torch's ops on a small batch in float32.
PARITY_BOUND = 1e-4
SETTING: dict[str, Any] = {"batch_size": 2, "num_tokens": 4096, "context_tokens": 4096, "dtype": "bfloat16"}
TINY_SETTING: dict[str, Any] = {"batch_size": 1, "num_tokens": 8, "context_tokens": 8, "dtype": "bfloat16"}
_SPARE_TOKENS = 256
_EFFORT = {TRAINING: Effort(3, 10, 3.0), DECODE: Effort(10, 100, 2.0)}


def host_config(tiny: bool) -> Qwen3Config:
    """Return the config of the host."""
    if tiny:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    else:
        sizes = {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    fields: dict[str, Any] = {**sizes, **heads, "tie_word_embeddings": True, "attn_implementation": "sdpa"}
    return Qwen3Config(**fields)


def build(variant: str, tiny: bool, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model with fixed random weights."""
    torch.manual_seed(0)
    fields, host = VARIANTS[variant], host_config(tiny)
    with torch.device(device):
        if fields is None:
            model: PreTrainedModel = Qwen3ForCausalLM(host)
        else:
            model = DepthAttnForCausalLM(DepthAttnConfig(text_config=copy.deepcopy(host), **fields))
    # transformers wraps the method so that mypy takes it for a function.
    return model.to(device, dtype)  # type: ignore[arg-type]


def measure(
    clock: Clock,
    left: Callable[[], float],
    tiny: bool,
    forbidden: dict[str, str],
    done: Callable[[dict], None],
    compiled: bool = True,
) -> None:
    """Measure all rows, and pass each to `done` when it is complete.

    Args:
        clock: clock of the device.
        left: function that returns the seconds left for this part.
        tiny: whether this is a dry run.
        forbidden: variants that are not timed because an op failed the parity check, with the reason.
        done: function that takes a row as JSON values.
        compiled: also measure under `torch.compile`.
    """
    parity = {}
    for variant in VARIANTS:
        if VARIANTS[variant] is not None:
            parity[variant] = gpu_run.guarded(partial(model_parity, variant, tiny, clock.device), left())
    for mode in (EAGER, COMPILED) if compiled else (EAGER,):
        for variant in VARIANTS:
            row: dict[str, Any] = {
                "name": variant,
                "mode": mode,
                "parity": parity.get(variant, {"status": "not checked"}),
                "steps": {},
            }
            wrong = forbidden.get(variant)
            if row["parity"]["status"] not in ("ok", "not checked"):
                wrong = f"parity: {row['parity']['reason']}"
            elif not row["parity"].get("ok", True):
                wrong = "parity failed: not timed"
            for name, make in ((TRAINING, training_step), (DECODE, decode_step)):
                if wrong is not None:
                    row["steps"][name] = {"status": "wrong", "reason": wrong}
                    continue
                seconds = min(gpu_run.ROW_SECONDS if mode == EAGER else gpu_run.SLOW_ROW_SECONDS, left())
                row["steps"][name] = gpu_run.guarded(
                    partial(_measure_step, make, name, variant, mode, clock, tiny), seconds
                )
                torch.compiler.reset()
            done(row)


def _measure_step(make: Callable, name: str, variant: str, mode: str, clock: Clock, tiny: bool) -> dict:
    setting = TINY_SETTING if tiny else SETTING
    model = build(variant, tiny, clock.device, getattr(torch, setting["dtype"]))
    step, num_tokens = make(model, mode, setting)
    found = clock.measure(step, Effort(2, 3, 0.0) if tiny else _EFFORT[name])
    return {**found, "tokens_per_s": num_tokens / found["median_s"]}


def training_step(model: PreTrainedModel, mode: str, setting: dict) -> tuple[Callable[[], Tensor], int]:
    """Return a training step and the number of tokens that it processes."""
    model.train()
    device = next(model.parameters()).device
    ids = _ids(model, setting["batch_size"], setting["num_tokens"], device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    run = _compiled(model, device) if mode == COMPILED else model

    def step() -> Tensor:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step, ids.numel()


def decode_step(model: PreTrainedModel, mode: str, setting: dict) -> tuple[Callable[[], Tensor], int]:
    """Return a decode step of one token, and the number of tokens; the cache grows by one per step."""
    model.eval()
    device = next(model.parameters()).device
    num_context = setting["context_tokens"]
    ids = _ids(model, 1, num_context + 1, device)
    if mode == COMPILED:
        cache: Cache = StaticCache(config=model.config.get_text_config(), max_cache_len=num_context + _SPARE_TOKENS)
    else:
        cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    # CUDA graphs hide the launch overhead of small decode steps.
    run = _compiled(model, device, mode="reduce-overhead", dynamic=False) if mode == COMPILED else model

    def step() -> Tensor:
        with torch.no_grad():
            return run(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits

    return step, 1


def _compiled(model: PreTrainedModel, device: torch.device, **options) -> Callable[..., Any]:
    # A dry run skips the slow compiler.
    return torch.compile(model, **options) if device.type == "cuda" else torch.compile(model, backend="aot_eager")


def model_parity(variant: str, tiny: bool, device: torch.device) -> dict:
    """Compare loss and embedding gradient between our kernels and torch's ops in float32 on 64 tokens."""
    model = build(variant, tiny, device, torch.float32).train()
    ids = _ids(model, 1, 64, device)
    found = []
    for scope in (contextlib.nullcontext, without_kernels):
        with scope():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            found.append((loss.detach(), *torch.autograd.grad(loss, model.get_input_embeddings().weight)))
    errors = [((a - e).norm() / e.norm()).item() for a, e in zip(*found, strict=True)]
    worst = torch.tensor(errors).max().item()
    return {"ok": worst <= PARITY_BOUND, "bound": PARITY_BOUND, "worst": worst, "dtype": "float32"}


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Run every op with torch."""
    ours = dict(op_dispatch.OPS)
    op_dispatch.OPS.update({name: dataclasses.replace(op, triton_impl=None) for name, op in ours.items()})
    try:
        yield
    finally:
        op_dispatch.OPS.update(ours)


def _ids(model: PreTrainedModel, batch_size: int, num_tokens: int, device: torch.device) -> Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (batch_size, num_tokens), generator=generator).to(device)
