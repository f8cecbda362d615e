"""The tokenizer of a model that is trained from scratch: BPE trained on its text, bytes, or an existing one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from ..errors.messages import one_line
from ..utils.paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"

#: Smallest vocabulary: 256 bytes and two special tokens. With this size, a token is a byte.
NUM_BYTE_TOKENS = 258


def make_tokenizer(source: str, texts: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Return a trained or an existing tokenizer.

    Args:
        source: `"bpe"` for BPE trained on the texts, `"bytes"` for one token per byte, or a folder or Hub id.
        texts: the texts.
        vocab_size: number of tokens of BPE.
        max_length: length of sequences; an existing tokenizer keeps its own.

    Raises:
        UserError: if there is no such tokenizer, or `vocab_size` is too small.
    """
    if source in ("bpe", "bytes"):
        return train_tokenizer(texts, vocab_size if source == "bpe" else NUM_BYTE_TOKENS, max_length=max_length)
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(user_path(source))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: {source} is neither 'bpe', 'bytes' nor a tokenizer: {one_line(error)}") from error
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int, *, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which decodes every text exactly.

    As in GPT-2, one token ends a document and starts the next, so it is both the bos and the eos token.

    Args:
        texts: the texts.
        vocab_size: number of tokens; 258 for one token per byte. A short text may give fewer.
        max_length: length of sequences, saved as the tokenizer's `model_max_length`.

    Raises:
        UserError: if `vocab_size` is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < NUM_BYTE_TOKENS:
        raise UserError(
            f"vocab_size: {vocab_size} must be at least {NUM_BYTE_TOKENS}, 256 bytes and 2 special tokens."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
