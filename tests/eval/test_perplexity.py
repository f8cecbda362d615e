"""`hf_depthattn.eval.perplexity` against direct computations."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_depthattn.eval.perplexity import PerplexityResult, perplexity

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


def tiny_llama(**kwargs) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        # Large weights: the prediction must depend on the context, or a wrong window would go unnoticed.
        initializer_range=0.5,
        **kwargs,
    )
    return LlamaForCausalLM(config).eval()


def token_ids(num_tokens: int) -> list[int]:
    return torch.randint(99, (num_tokens,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def loss_of_each_token(model, ids: list[int], window: int, stride: int) -> list[float]:
    """Loop over the tokens, one forward pass each, float64: what each token's loss is by the definition."""
    losses = []
    num_predictions = len(ids) - 1
    window = min(window, num_predictions)
    for i in range(num_predictions):
        # The first of the windows [0, W), [S, S + W), ... that contains prediction i; the last one ends with the text.
        start = 0 if i < window else min(stride * math.ceil((i + 1 - window) / stride), num_predictions - window)
        context = torch.tensor([ids[start : i + 1]])
        logits = model(context, use_cache=False).logits[0, -1].double()
        losses.append(-logits.log_softmax(-1)[ids[i + 1]].item())
    return losses


def test_short_text_equals_one_forward_pass():
    model, ids = tiny_llama(), token_ids(29)
    expected = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    result = perplexity(model, ids, None, window=512, stride=256)
    assert result.loss_nats_per_token == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (result.num_tokens, result.num_bytes, result.bits_per_byte) == (28, None, None)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("num_tokens", "window", "stride"),
    [(63, 16, 5), (63, 16, 16), (63, 16, 1), (63, 17, 9), (17, 16, 5), (18, 16, 5), (19, 1, 1), (2, 7, 3)],
)
def test_long_text_equals_a_loop_over_tokens(num_tokens, window, stride, batch_size):
    model, ids = tiny_llama(), token_ids(num_tokens)
    losses = loss_of_each_token(model, ids, window, stride)
    result = perplexity(model, torch.tensor(ids), None, window=window, stride=stride, batch_size=batch_size)
    assert result.num_tokens == len(losses) == num_tokens - 1
    assert result.loss_nats_per_token == pytest.approx(sum(losses) / len(losses), rel=TOLERANCE[torch.float32])


def test_longer_context_changes_the_result():
    # Guards the two tests above: with this model the window matters.
    model, ids = tiny_llama(), token_ids(63)
    short, long = (perplexity(model, ids, None, window=w, stride=w).loss_nats_per_token for w in (4, 63))
    assert abs(short - long) > 1e-2


def test_bfloat16_logits_are_scored_in_float32():
    model, ids = tiny_llama().bfloat16(), token_ids(63)
    losses = loss_of_each_token(model, ids, 16, 5)
    result = perplexity(model, ids, None, window=16, stride=5)
    assert result.loss_nats_per_token == pytest.approx(sum(losses) / len(losses), rel=TOLERANCE[torch.bfloat16])


def test_tokenizer_and_bits_per_byte():
    def tokenizer(text: str, verbose: bool) -> dict:
        return {"input_ids": list(text.encode())}

    text = "Grüße, depth!"
    model = tiny_llama()
    model.resize_token_embeddings(256)
    result = perplexity(model, tokenizer, text, window=8, stride=4)
    num_bytes = len(text.encode())
    assert (result.num_tokens, result.num_bytes) == (num_bytes - 1, num_bytes)
    expected = result.loss_nats_per_token * result.num_tokens / math.log(2) / num_bytes
    assert result.bits_per_byte == pytest.approx(expected)


def test_model_runs_without_cache_in_evaluation_mode_and_keeps_its_own(monkeypatch):
    model, ids = tiny_llama(attention_dropout=0.5), token_ids(29)
    expected = perplexity(model, ids, None, window=16, stride=8)
    model.train()
    seen = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **k: seen.append((k["use_cache"], model.training)) or forward(*a, **k)
    )
    assert perplexity(model, ids, None, window=16, stride=8) == expected
    assert set(seen) == {(False, False)}
    assert model.training


def test_overflowing_perplexity_is_infinite():
    model = tiny_llama()
    model.lm_head.weight.data.mul_(1e4)
    result = perplexity(model, token_ids(29), None, window=16, stride=8)
    assert isinstance(result, PerplexityResult)
    assert math.isinf(result.perplexity)
    assert math.isfinite(result.loss_nats_per_token)


@pytest.mark.parametrize("ids", [[], [5]], ids=["empty", "one token"])
def test_too_short_text_is_refused(ids):
    with pytest.raises(ValueError, match=f"at least 2 tokens, got {len(ids)}"):
        perplexity(tiny_llama(), ids, None, window=16, stride=8)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window": 0, "stride": 1}, "window must be at least 1, got 0"),
        ({"window": 8, "stride": 0}, "stride must be between 1 and window=8, got 0"),
        ({"window": 8, "stride": 9}, "stride must be between 1 and window=8, got 9"),
        ({"window": 8, "stride": 4, "batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_llama(), token_ids(29), None, **kwargs)


def test_tokenizer_without_text_and_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="text is None"):
        perplexity(tiny_llama(), lambda text, verbose: {}, None, window=8, stride=4)
    with pytest.raises(ValueError, match=r"shape \[T\], got \[1, 29\]"):
        perplexity(tiny_llama(), torch.tensor([token_ids(29)]), None, window=8, stride=4)
