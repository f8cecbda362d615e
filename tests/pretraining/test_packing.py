"""Packing: every token in order, documents separated, no padding; the held-out part is the end."""

import pytest
import torch

from hf_depthattn.errors import UserError
from hf_depthattn.pretraining.packing import PackedText, hold_out, pack, pack_and_hold_out, thin_out
from hf_depthattn.pretraining.text_tokenizer import NUM_BYTE_TOKENS, train_tokenizer

TEXTS = ["first text\n", "zweiter Text, größer", "x" * 70]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, NUM_BYTE_TOKENS, max_length=16)


def test_blocks_contain_every_document_and_its_end(tokenizer):
    # More documents than are tokenised at once.
    documents = TEXTS * 50
    blocks = pack(tokenizer, documents, 13)
    expected = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert blocks.shape == (len(expected) // 13, 13)
    assert blocks.flatten().tolist() == expected[: blocks.numel()]


def test_a_tokenizer_without_an_end_adds_none(tokenizer):
    without = train_tokenizer(TEXTS, NUM_BYTE_TOKENS, max_length=16)
    without.eos_token = None
    assert pack(without, TEXTS, 1).flatten().tolist() == [t for x in TEXTS for t in tokenizer(x)["input_ids"]]


def test_a_short_text_is_refused(tokenizer):
    with pytest.raises(UserError, match="--text: 2 tokens are fewer than one block of 3; give more text"):
        pack(tokenizer, ["a"], 3, name="--text")
    with pytest.raises(UserError, match="--text: is a single block of 2 tokens, but one is held out"):
        hold_out(pack(tokenizer, ["a"], 2), name="--text")


@pytest.mark.parametrize(("number", "expected"), [(2, 1), (39, 1), (100, 5), (2000, 100)])
def test_the_last_twentieth_is_held_out(number, expected):
    blocks = torch.arange(3 * number).view(number, 3)
    train, held_out = hold_out(blocks)
    assert len(held_out) == expected and torch.equal(torch.cat([train, held_out]), blocks)


def test_held_out_documents_are_packed_apart_and_without_them_the_end_is_held_out(tokenizer):
    blocks = pack(tokenizer, TEXTS, 13)
    train, held_out = pack_and_hold_out(tokenizer, TEXTS, TEXTS[2:], 13)
    assert torch.equal(train, blocks) and torch.equal(held_out, pack(tokenizer, TEXTS[2:], 13))
    train, held_out = pack_and_hold_out(tokenizer, TEXTS, [], 13)
    assert len(held_out) == 1 and torch.equal(torch.cat([train, held_out]), blocks)


def test_evaluated_blocks_are_spread_over_all_held_out_ones():
    _, held_out = hold_out(torch.arange(4000).view(4000, 1))
    chosen = thin_out(held_out, 64, 8, 1).flatten().tolist()
    assert len(chosen) == 64 and chosen[0] == 3800 and chosen[-1] > 3990


def test_evaluated_blocks_are_spread_and_fill_the_batches_of_all_processes():
    blocks = torch.arange(7).view(7, 1)
    for at_most, batch_size, num_processes, kept in (
        (9, 2, 1, range(7)),
        (3, 2, 1, (0, 2, 4)),
        (9, 2, 2, (0, 1, 3, 5)),
        (9, 1, 2, range(6)),
        (9, 4, 2, range(7)),
    ):
        chosen = thin_out(blocks, at_most, batch_size, num_processes).flatten().tolist()
        assert chosen == list(kept)


def test_items_are_for_trainer():
    data = PackedText(torch.arange(6, dtype=torch.int32).view(2, 3))
    assert len(data) == 2 and data[1]["input_ids"].tolist() == data[1]["labels"].tolist() == [3, 4, 5]
    assert data[0]["labels"].dtype == torch.long
