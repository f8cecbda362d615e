"""`perplexity_domains`: several texts, against direct computations."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_checkpoints import save_stock
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_depthattn.errors import UserError
from hf_depthattn.eval.perplexity import perplexity
from hf_depthattn.eval.perplexity_domains import evaluate_domains
from hf_depthattn.eval.perplexity_results import PerplexityReport

WINDOW, STRIDE = 16, 7


STORY = "The cat sat on the mat. It was a very long day, and nobody came by."


DOMAINS = {"story": [STORY, STORY[:11], STORY[5:40]], "code": ["def add(a, b):\n    return a + b\n"]}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_stock(tmp_path_factory.mktemp("stock") / "llama")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def summed_loss(model, ids: list[int]) -> float:
    """By the definition, in float64: a loop over the tokens, each with the context of its first window."""
    num_predictions, total = len(ids) - 1, 0.0
    window = min(WINDOW, num_predictions)
    for i in range(num_predictions):
        start = 0 if i < window else min(STRIDE * math.ceil((i + 1 - window) / STRIDE), num_predictions - window)
        logits = model(torch.tensor([ids[start : i + 1]]), use_cache=False).logits[0, -1].double()
        total -= logits.log_softmax(-1)[ids[i + 1]].item()
    return total


def test_domains_equal_a_direct_computation(loaded):
    model, tokenizer = loaded
    results = evaluate_domains(model, tokenizer, DOMAINS, window=WINDOW, stride=STRIDE, batch_size=3)
    for name, documents in DOMAINS.items():
        ids = [tokenizer(text)["input_ids"] for text in documents]
        loss, num_tokens = sum(summed_loss(model, i) for i in ids), sum(len(i) - 1 for i in ids)
        num_bytes = sum(len(text.encode()) for text in documents)
        domain = results[name]
        assert domain.perplexity == pytest.approx(math.exp(loss / num_tokens), rel=1e-5)
        assert domain.bits_per_byte == pytest.approx(loss / math.log(2) / num_bytes, rel=1e-6)
        assert (domain.num_tokens, domain.num_bytes) == (num_tokens, num_bytes)
        assert (domain.num_documents, domain.num_skipped_documents) == (len(documents), 0)
    for quantity in ("perplexity", "bits_per_byte"):
        values = [getattr(domain, quantity) for domain in results.values()]
        assert getattr(PerplexityReport({}, results).mean, quantity) == pytest.approx(sum(values) / 2)


def test_one_document_equals_perplexity(loaded):
    model, tokenizer = loaded
    expected = perplexity(model, tokenizer, STORY, window=WINDOW, stride=STRIDE)
    results = evaluate_domains(model, tokenizer, {"story": [STORY]}, window=WINDOW, stride=STRIDE)
    assert results["story"].bits_per_byte == pytest.approx(expected.bits_per_byte)
    assert results["story"].perplexity == pytest.approx(expected.perplexity)


def test_documents_without_a_prediction_are_skipped_and_counted(loaded):
    model, tokenizer = loaded
    (domain,) = evaluate_domains(model, tokenizer, {"d": ["a", STORY]}, window=8, stride=8).values()
    assert (domain.num_documents, domain.num_skipped_documents) == (1, 1)
    assert domain.num_bytes == len(STORY)


def test_text_shorter_than_one_window_is_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(UserError, match=r"short: 16 tokens, less than one window of 16 .*--window"):
        evaluate_domains(model, tokenizer, {"short": [STORY[:16]]}, window=WINDOW, stride=STRIDE)
    evaluate_domains(model, tokenizer, {"enough": [STORY[:17]]}, window=WINDOW, stride=STRIDE)


def test_every_domain_is_handed_over_when_it_is_scored(loaded):
    model, tokenizer = loaded
    handed = []
    results = evaluate_domains(
        model, tokenizer, DOMAINS, window=WINDOW, stride=STRIDE, on_domain=lambda *domain: handed.append(domain)
    )
    assert handed == list(results.items())
