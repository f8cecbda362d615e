"""What identifies a run, and what all runs of a study have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .arms import ARMS


@dataclass(frozen=True)
class Run:
    """A run of the study: everything that distinguishes it from the other runs.

    Attributes:
        corpus: name of the corpus, a key of `corpora.CORPORA`.
        tokens: training budget in bytes.
        arm: name of the arm, a key of `arms.ARMS`.
        num_layers: number of decoder layers.
        learning_rate: peak learning rate.
        depth_lr_factor: learning rate of the depth parameters relative to `learning_rate`.
        seed: seed of the initial weights and of the order of the data.
        start_rate: peak learning rate with which the continued model was trained; `None` for training from scratch.
    """

    corpus: str
    tokens: int
    arm: str
    num_layers: int
    learning_rate: float
    depth_lr_factor: float = 1.0
    seed: int = 0
    start_rate: float | None = None

    @property
    def path(self) -> Path:
        """Path of its results relative to the folder of all results, without a suffix."""
        factor = "" if self.depth_lr_factor == 1 else f"-depth{self.depth_lr_factor:g}"
        name = f"{self.arm}-{self.num_layers}l-lr{self.learning_rate:g}{factor}-seed{self.seed}"
        return Path(self.corpus) / str(self.tokens) / name

    @property
    def start(self) -> Run | None:
        """The run whose model is continued."""
        if self.start_rate is None:
            return None
        arm = ARMS[self.arm].start
        assert arm is not None, f"{self.arm} starts from scratch"
        return replace(self, arm=arm, learning_rate=self.start_rate, depth_lr_factor=1.0, start_rate=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """What all runs have in common, so that they can be compared.

    Attributes:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads: sizes of the host, a Llama.
        initializer_range: standard deviation of the host's initial weights.
        sequence_length: bytes per sequence.
        batch_size: sequences per step.
        warmup: part of the steps in which the learning rate grows.
        final_rate: learning rate at the end, relative to the peak; it falls as a cosine.
        weight_decay: weight decay of AdamW, for matrices of the host and MoDA's projections.
        beta2: second coefficient of AdamW; the first is 0.9.
        clip: largest norm of the gradient.
        heldout_sequences: sequences of the held-out text that every evaluation uses.
        num_evaluations: evaluations during training, evenly spaced; one more precedes the first step.
        num_train_points: points of the curve of the training loss.
        num_threads: threads of a run.
    """

    hidden_size: int = 64
    intermediate_size: int = 192
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    initializer_range: float = 0.06
    sequence_length: int = 128
    batch_size: int = 4
    warmup: float = 0.1
    final_rate: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    heldout_sequences: int = 96
    num_evaluations: int = 4
    num_train_points: int = 40
    num_threads: int = 1

    def with_values(self, assignments: list[str]) -> Setting:
        """Return a setting with other values.

        Args:
            assignments: `NAME=VALUE` each.

        Raises:
            ValueError: if a name is no field or a value has not its type.
        """
        kinds: dict[str, type] = {name: type(value) for name, value in asdict(self).items()}
        values: dict[str, Any] = {}
        for assignment in assignments:
            name, _, value = assignment.partition("=")
            if name not in kinds:
                raise ValueError(f"{assignment}: {name!r} is not one of {', '.join(kinds)}.")
            try:
                values[name] = kinds[name](value)
            except ValueError as error:
                raise ValueError(f"{assignment}: {value!r} is not {kinds[name].__name__}.") from error
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)
