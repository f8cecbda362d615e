"""Text for depth metrics, as full windows of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class TextBatches:
    """Sequences of equal length, iterated in batches; every iteration yields the same batches.

    Attributes:
        ids: token ids `[N, T]` with T >= 2, without padding.
        batch_size: sequences per forward pass.
    """

    ids: Tensor
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.shape[0] < 1 or self.ids.shape[1] < 2:
            raise ValueError(f"ids must have the shape [N, T] with N >= 1 and T >= 2, got {list(self.ids.shape)}")
        if self.ids.is_floating_point():
            raise ValueError(f"ids must be integers, got {self.ids.dtype}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @classmethod
    def from_text(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        *,
        sequence_length: int,
        num_sequences: int | None = None,
        batch_size: int = 4,
    ) -> TextBatches:
        """Split a text into consecutive windows; tokens after the last full window are dropped.

        Args:
            tokenizer: a tokenizer of transformers; special tokens are added once, at the start of the text.
            text: the text.
            sequence_length: tokens per window.
            num_sequences: number of windows to keep, spread evenly over the text; all by default.
            batch_size: sequences per forward pass.

        Raises:
            ValueError: if the text is shorter than one window, or has fewer windows than requested.
        """
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
        if num_sequences is not None and num_sequences < 1:
            raise ValueError(f"num_sequences must be at least 1, got {num_sequences}")
        # verbose=False: do not warn about texts longer than the model's context, which are split into windows.
        ids = torch.as_tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
        num_windows = len(ids) // sequence_length
        if num_windows == 0:
            raise ValueError(f"text has {len(ids)} tokens, shorter than one window of {sequence_length}")
        windows = ids[: num_windows * sequence_length].view(num_windows, sequence_length)
        if num_sequences is not None:
            if num_sequences > num_windows:
                raise ValueError(f"num_sequences: {num_sequences}, but the text has {num_windows} full windows")
            windows = windows[[i * num_windows // num_sequences for i in range(num_sequences)]]
        return cls(windows, batch_size)

    @classmethod
    def of(cls, batches: TextBatches | Tensor | Iterable[Tensor]) -> TextBatches:
        """Build from `TextBatches`, a tensor `[N, T]`, or batches `[B, T]` with equal T."""
        if isinstance(batches, TextBatches):
            return batches
        if isinstance(batches, Tensor):
            return cls(batches)
        parts = list(batches)
        if not parts:
            raise ValueError("batches: empty; give at least one batch of token ids")
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(f"batches must hold sequences of one length, got {[list(part.shape) for part in parts]}")
        return cls(torch.cat([part.cpu() for part in parts]), max(len(part) for part in parts))

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.ids.split(self.batch_size)

    def __len__(self) -> int:
        """Batches."""
        return -(-self.num_sequences // self.batch_size)

    @property
    def num_sequences(self) -> int:
        return self.ids.shape[0]

    @property
    def sequence_length(self) -> int:
        return self.ids.shape[1]

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()

    @property
    def sha256(self) -> str:
        """Hash of the shape and of the token ids as 64-bit integers, which identifies the text."""
        ids = self.ids.to("cpu", torch.int64).contiguous()
        header = "x".join(map(str, ids.shape)).encode()
        return hashlib.sha256(header + b":" + ids.numpy().astype("<i8").tobytes()).hexdigest()

    def first(self, num_sequences: int) -> TextBatches:
        """Return the first sequences; all of them if there are fewer."""
        return TextBatches(self.ids[:num_sequences], self.batch_size)

    def halves(self) -> tuple[TextBatches, TextBatches]:
        """Split into the sequences with even and with odd index, so that both halves are spread over the text.

        Raises:
            ValueError: if there is only one sequence.
        """
        if self.num_sequences < 2:
            raise ValueError("ids: 1 sequence has no two halves; give at least 2")
        return TextBatches(self.ids[::2], self.batch_size), TextBatches(self.ids[1::2], self.batch_size)
