"""`TextBatches`: windows, hashes, halves."""

import pytest
import torch
from tiny_hosts import random_ids

from hf_depthattn.eval.metrics.probing.text import TextBatches


def test_text_batches_hash_the_tokens_and_their_shape():
    ids = random_ids(4, 6)
    text = TextBatches(ids, batch_size=3)
    assert text.sha256 == TextBatches(ids.int().clone(), batch_size=1).sha256
    assert text.sha256 != TextBatches(ids.view(2, 12)).sha256
    changed = ids.clone()
    changed[3, 5] = 3 + (changed[3, 5] - 2) % 90
    assert text.sha256 != TextBatches(changed).sha256
    assert [len(batch) for batch in text] == [3, 1] and len(text) == 2
    first, second = text.halves()
    assert torch.equal(first.ids, ids[[0, 2]]) and torch.equal(second.ids, ids[[1, 3]])


def test_text_is_cut_into_full_windows():
    def tokenizer(text, verbose):
        return {"input_ids": [ord(letter) for letter in text]}

    text = TextBatches.from_text(tokenizer, "abcdefghijk", sequence_length=3)
    assert text.ids.tolist() == [[97, 98, 99], [100, 101, 102], [103, 104, 105]]
    spread = TextBatches.from_text(tokenizer, "abcdefghijkl", sequence_length=3, num_sequences=2)
    assert spread.ids[:, 0].tolist() == [97, 103]
    with pytest.raises(ValueError, match="text has 2 tokens, shorter than one window of 3"):
        TextBatches.from_text(tokenizer, "ab", sequence_length=3)
    with pytest.raises(ValueError, match="num_sequences: 5, but the text has 3"):
        TextBatches.from_text(tokenizer, "abcdefghijk", sequence_length=3, num_sequences=5)
