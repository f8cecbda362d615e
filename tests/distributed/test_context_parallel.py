"""MoDA in torch's `context_parallel`: what would see the tokens of one process only is refused by name."""

import types

import pytest
import torch
from context_parallel_checks import RING, model_of, prepared, split
from tiny_hosts import random_ids
from torch.distributed.tensor import experimental
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_depthattn.context_parallel import context_parallel_group, refuse_split_sequence
from hf_depthattn.moda_attention_ops import ModaInputs, moda_attention

IDS = random_ids(2, 16)


def refused(message: str, model, ids: torch.Tensor = IDS, **arguments) -> None:
    with split(ids) as batch, pytest.raises(ValueError, match=message):
        model(**batch, **{"use_cache": False, **arguments})
    assert context_parallel_group() is None


def test_other_implementations_than_sdpa_are_refused(process_group):
    model, query = prepared(model_of("moda")), torch.randn(2, 4, 16, 8)
    model.set_attn_implementation("eager")
    refused("attn_implementation: 'eager' does not support MoDA in context parallelism", model)
    with split(IDS), pytest.raises(ValueError, match="attn_implementation: 'flex_attention'"):
        refuse_split_sequence("flex_attention", None, query, query, None, 0.0)


def test_masks_dropout_and_caches_are_refused(process_group):
    model = model_of("moda")
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool).tril()
    refused(r"attention_mask: got a mask of shape \(2, 1, 16, 16\)", model, attention_mask=mask)
    refused(r"attention_dropout: 0\.5 is not supported", prepared(model_of("moda", attention_dropout=0.5)))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    refused(r"use_cache: got 32 keys for 16 tokens", prepared(model), past_key_values=cache)


def test_one_token_per_process_is_refused(process_group, monkeypatch):
    """Without torch's reordering a process may have one token, for which transformers asks for no causal mask."""
    monkeypatch.setattr(RING._cp_options, "enable_load_balance", False)
    model, token = prepared(model_of("moda")), random_ids(2, 1)
    refused(r"at least 2 tokens per process, got causal=False and 1 tokens", model, ids=token)


def test_compiled_attention_is_refused(process_group):
    """A compiled model has chosen its kernel when it was traced, which may have been outside of the context."""
    query, slot = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    inputs = ModaInputs(query, query, query, [slot], [slot], scale=1.0, causal=True)
    compiled = torch.compile(moda_attention, backend="eager")
    with split(IDS), pytest.raises(RuntimeError, match="kernel 'flash_cpu' attends to the tokens of one process"):
        compiled(inputs)
    compiled(inputs)


def test_backward_outside_of_the_context_is_refused(process_group):
    model = prepared(model_of("moda"))
    with split(IDS) as batch:
        loss = model(**batch, use_cache=False).loss
    with pytest.raises(RuntimeError, match="run forward and backward within `context_parallel`"):
        loss.backward()


def test_a_split_that_is_not_recognised_is_refused(process_group):
    """Hooks on modules, which torch has beside the context, and a future form of the context."""
    model, ids = model_of("moda"), random_ids(2, 16)
    experimental._attention._enable_context_parallel_dispatcher()
    try:
        with pytest.raises(RuntimeError, match="splits the tokens in another way"):
            model(ids)
    finally:
        experimental._attention._disable_context_parallel_dispatcher()
    model(ids)


def test_sequence_parallelism_of_deepspeed_is_refused(monkeypatch):
    """DeepSpeed replaces transformers' function by one of its own, which MoDA does not call."""
    namespace = {"__name__": "deepspeed.runtime.sequence_parallel.ulysses_sp"}
    replacement = types.FunctionType(compile("0", "ulysses", "eval"), namespace)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", replacement)
    with pytest.raises(ValueError, match="sp_size > 1"):
        model_of("moda")(IDS)
