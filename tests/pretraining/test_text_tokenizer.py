"""Tokenizers of new models: any text is decoded exactly, bytes are tokens, and existing tokenizers are taken."""

import pytest

from hf_depthattn.errors import UserError
from hf_depthattn.pretraining.text_tokenizer import NUM_BYTE_TOKENS, make_tokenizer

TEXTS = ["the cat sat on the mat, the cat sat still"] * 3
OTHER = "größer than the mat \u2028\n\tπ 🐈"


@pytest.mark.parametrize(("source", "size"), [("bpe", 270), ("bytes", NUM_BYTE_TOKENS)])
def test_every_text_is_decoded_exactly(source, size):
    tokenizer = make_tokenizer(source, TEXTS, 270, 32)
    assert len(tokenizer) == size and tokenizer.model_max_length == 32
    for text in (*TEXTS, OTHER):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id != tokenizer.pad_token_id


def test_bytes_are_tokens():
    tokenizer = make_tokenizer("bytes", TEXTS, 270, 32)
    assert len(tokenizer(OTHER)["input_ids"]) == len(OTHER.encode())


def test_an_existing_tokenizer_is_loaded(tmp_path):
    make_tokenizer("bpe", TEXTS, 270, 32).save_pretrained(tmp_path)
    again = make_tokenizer(str(tmp_path), [], 9, 64)
    assert len(again) == 270 and again.model_max_length == 32


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match="vocab_size: 257 must be at least 258"):
        make_tokenizer("bpe", TEXTS, 257, 32)
    with pytest.raises(UserError, match=r"tokenizer: .*missing is neither 'bpe', 'bytes' nor a tokenizer: "):
        make_tokenizer(str(tmp_path / "missing"), TEXTS, 300, 32)
