"""What `verify` reads: in batches as one by one, within the limits of a model, no further than the end of a text."""

from types import SimpleNamespace

import pytest
import torch
from tiny_hosts import VOCAB_SIZE, tiny_stock_model

from hf_depthattn.errors import UserError
from hf_depthattn.eval.verify import reading as verify_reading
from hf_depthattn.eval.verify.comparison import compare
from hf_depthattn.eval.verify.reading import measure, plan_reading


class Count:
    def __init__(self):
        self.steps = 0

    def update(self, n: int) -> None:
        self.steps += n


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_stock_model("llama", dtype=torch.float64).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (700,), generator=torch.Generator().manual_seed(0))


def test_batches_change_nothing(model, ids, monkeypatch):
    plan = plan_reading(ids, ids, model.config, 9, with_text=True)
    together = measure(model, plan, Count())
    assert len(together.outputs) == 1
    monkeypatch.setattr(verify_reading, "_MAX_BATCH", 1)
    alone = measure(model, plan_reading(ids, ids, model.config, 9, with_text=True), Count())
    assert len(alone.outputs) == 4
    assert torch.allclose(torch.cat(alone.outputs), together.outputs[0], rtol=0, atol=1e-12)
    assert alone.perplexity == pytest.approx(together.perplexity, rel=1e-12)
    for prompt, tokens in zip(plan.prompts, together.greedy_tokens, strict=True):
        expected = model.generate(prompt[None], max_new_tokens=9, do_sample=False)[0, len(prompt) :]
        assert tokens == expected.tolist()


def test_a_greedy_text_ends_with_its_last_token(model, ids):
    plan = plan_reading(ids, None, model.config, 9, with_text=True)
    first, second = measure(model, plan, Count()).greedy_tokens
    end = first[2]
    stop = first.index(end) + 1
    model.generation_config.eos_token_id = [end]
    measured = measure(model, plan, Count())
    length = second.index(end) + 1 if end in second else 9
    assert measured.greedy_tokens == [first[:stop], second[:length]] and stop < 9
    assert [len(logits) for logits in measured.greedy_logits] == [stop, length]


def test_every_pass_is_counted_once(model, ids):
    plan = plan_reading(ids, ids, model.config, 9, with_text=True)
    count = Count()
    measure(model, plan, count)
    # One batch of windows, nine tokens, and one batch of windows for the perplexity.
    assert count.steps == plan.num_steps == 1 + 9 + 1


@pytest.mark.parametrize("limit, window, num_new", [(None, 128, 32), (40, 40, 32), (8, 8, 7), (2, 2, 1)])
def test_reading_stays_within_the_limit_of_a_model(limit, window, num_new, ids):
    config = SimpleNamespace(max_position_embeddings=limit, vocab_size=VOCAB_SIZE)
    plan = plan_reading(ids, ids, config, 32, with_text=True)
    assert (plan.windows.shape[1], plan.num_new) == (window, num_new)
    assert limit is None or plan.prompts.shape[1] + plan.num_new <= limit
    assert plan.prompts.shape[1] >= 1


def test_a_model_that_reads_one_token_is_refused(ids):
    config = SimpleNamespace(max_position_embeddings=1, vocab_size=VOCAB_SIZE)
    with pytest.raises(UserError, match="max_position_embeddings: 1 is too few"):
        plan_reading(ids, ids, config, 32, with_text=True)


def test_batches_of_large_vocabularies_are_small(ids):
    config = SimpleNamespace(max_position_embeddings=None, vocab_size=2**20)
    plan = plan_reading(ids, ids, config, 32, with_text=True)
    assert plan.window_batch == 2 and plan.perplexity_batch == 1


def test_logits_that_are_all_zero_agree_with_themselves_only(model, ids):
    plan = plan_reading(ids, ids, model.config, 3, with_text=True)
    other = measure(model, plan, Count())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    zero = measure(model, plan, Count())
    assert all(row.ok for row in compare(zero, zero, "float32"))
    assert not compare(zero, other, "float32")[0].ok and not compare(other, zero, "float32")[0].ok
