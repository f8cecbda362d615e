"""Text as blocks of tokens for pretraining: documents one after the other, cut into sequences of equal length."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from ..utils.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Documents per call of the tokenizer, which runs on all cores.
_DOCUMENTS_AT_ONCE = 64


def pack(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[str],
    block_size: int,
    *,
    name: str = "text",
    progress: bool | None = False,
) -> Tensor:
    """Tokenise documents and cut them into blocks, without padding.

    Each document is followed by the end-of-sequence token, if the tokenizer has one. Blocks do not respect the limits
    of documents, and attention is not masked between the documents of a block, as is usual in pretraining.

    Args:
        tokenizer: the tokenizer.
        documents: the texts.
        block_size: tokens per block, T.
        name: name of the text in messages.
        progress: as in `progress_bar`.

    Returns:
        Token ids `[N, T]` in int32; the incomplete last block is dropped.

    Raises:
        UserError: if the text has fewer tokens than one block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[Tensor] = []
    with progress_bar(len(documents), f"tokenising {name}", progress, unit="documents") as bar:
        for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            texts = list(documents[first : first + _DOCUMENTS_AT_ONCE])
            # verbose=False: no warning about documents that are longer than the model's context.
            ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            parts += [torch.tensor(of_text + end, dtype=torch.int32) for of_text in ids]
            bar.update(len(texts))
    tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
    number = len(tokens) // block_size
    if number < 1:
        raise UserError(f"{name}: {len(tokens)} tokens are fewer than one block of {block_size}; give more text.")
    return tokens[: number * block_size].view(number, block_size)


def hold_out(blocks: Tensor, *, name: str = "text") -> tuple[Tensor, Tensor]:
    """Split blocks into those to train on and the last 5 %, at least one, to measure the loss on.

    Args:
        blocks: token ids `[N, T]`.
        name: name of the text in messages.

    Raises:
        UserError: if there is only one block.
    """
    if len(blocks) < 2:
        raise UserError(f"{name}: is a single block of {blocks.shape[1]} tokens, but one is held out; give more text.")
    number = max(1, len(blocks) // 20)
    return blocks[:-number], blocks[-number:]


def pack_and_hold_out(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[str],
    held_out: Sequence[str],
    block_size: int,
    *,
    name: str = "text",
    progress: bool | None = False,
) -> tuple[Tensor, Tensor]:
    """Return blocks to train on and blocks to measure the loss on: of held-out documents, or else as in `hold_out`.

    Args:
        tokenizer: the tokenizer.
        documents: the texts to train on.
        held_out: the held-out texts, which may be empty.
        block_size: tokens per block.
        name: name of the text in messages.
        progress: as in `progress_bar`.

    Raises:
        UserError: if a text is too short.
    """
    blocks = pack(tokenizer, documents, block_size, name=name, progress=progress)
    if held_out:
        return blocks, pack(tokenizer, held_out, block_size, name="held-out text")
    return hold_out(blocks, name=name)


def thin_out(blocks: Tensor, at_most: int, batch_size: int, num_processes: int) -> Tensor:
    """Choose blocks to measure the loss on, spread evenly over a text.

    Several processes get whole batches, as Trainer would count some blocks twice otherwise.

    Args:
        blocks: token ids `[N, T]`.
        at_most: maximum number of blocks.
        batch_size: blocks per batch and process.
        num_processes: number of processes. If there is less than one batch for each, some blocks are counted twice.
    """
    number = min(len(blocks), at_most)
    at_once = batch_size * num_processes
    if num_processes > 1 and number >= at_once:
        number = number // at_once * at_once
    return blocks[torch.arange(number) * len(blocks) // number]


class PackedText(Dataset[dict[str, Tensor]]):
    """A data set for `Trainer` whose items are blocks of tokens: `input_ids` and equal `labels`, which models shift.

    Args:
        blocks: token ids `[N, T]`, as returned by `pack`.
    """

    def __init__(self, blocks: Tensor):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.blocks[index].long()
        return {"input_ids": ids, "labels": ids}
