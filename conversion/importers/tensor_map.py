"""The mapping from the tensors of a checkpoint to those of the new one, in which every tensor is accounted for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...attn_res_reads import DEPTH_READS
from ...checkpoints.foreign_tensors import COMPUTED
from ...errors import UserError
from ...utils.text_table import few
from ..new_tensors import NewTensor, Piece
from .foreign_checkpoint import ForeignCheckpoint


@dataclass(frozen=True)
class Renaming:
    """Names of modules of a format, and their names in transformers.

    Attributes:
        layers: what comes before the number of a layer.
        in_layer: names of modules in a layer.
        on_top: names of the other modules.
    """

    layers: str
    in_layer: Mapping[str, str]
    on_top: Mapping[str, str]

    def new_name(self, name: str) -> str | None:
        """Return the new name of a tensor, `None` if its module has none."""
        module, _, leaf = name.rpartition(".")
        if match := re.match(rf"{re.escape(self.layers)}(\d+)\.(.+)", module):
            new = self.in_layer.get(match[2])
            return None if new is None else f"model.layers.{match[1]}.{new}.{leaf}"
        new = self.on_top.get(module)
        return None if new is None else f"{new}.{leaf}"


@dataclass(frozen=True)
class ReadNames:
    """Names of the queries and key norms of a format, without the last part, such as `.weight`.

    Attributes:
        attention: query and key norm before an attention sublayer, in a layer.
        mlp: those before an MLP sublayer, in a layer.
        output: those of the output site, with their full names.
        in_first_layer: whether the first attention sublayer has them; they have no effect there.
    """

    attention: tuple[str, str]
    mlp: tuple[str, str]
    output: tuple[str, str]
    in_first_layer: bool = True

    def of_sites(self, layers: str, num_layers: int) -> list[tuple[str, str] | None]:
        """Return the names of query and key norm of every site, `None` where a format has none.

        Args:
            layers: what comes before the number of a layer.
            num_layers: number of layers.
        """
        names: list[tuple[str, str] | None] = []
        for layer in range(num_layers):
            for query, norm in (self.attention, self.mlp):
                names.append((f"{layers}{layer}.{query}.weight", f"{layers}{layer}.{norm}.weight"))
        names.append((f"{self.output[0]}.weight", f"{self.output[1]}.weight"))
        if not self.in_first_layer:
            names[0] = None
        return names


@dataclass
class TensorMap:
    """New tensors, and the tensors of the source that they are made of.

    Attributes:
        foreign: the source.
        tensors: the new tensors by name.
        dropped: tensors of the source that are not needed, with the reason.
    """

    foreign: ForeignCheckpoint
    tensors: dict[str, NewTensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    def copy(self, name: str, new_name: str, factors: float | Tensor | None = None) -> None:
        """Copy a tensor.

        Args:
            name: its name in the source.
            new_name: its name in the new checkpoint.
            factors: a factor, or float64 `[rows]`, one per row of the tensor.

        Raises:
            UserError: if the source does not have it.
        """
        self.check_present(name)
        entry = self.foreign.entries[name]
        self._add(new_name, NewTensor(entry.dtype, entry.shape, (Piece(name, factors=factors),)))
        self._used.add(name)

    def split_rows(self, name: str, parts: Sequence[tuple[str, int, float | Tensor | None]]) -> None:
        """Split a tensor along its first axis.

        Args:
            name: its name in the source.
            parts: name in the new checkpoint, number of rows and factors of each part, as in `copy`.

        Raises:
            UserError: if the source does not have it, or it has another number of rows.
        """
        self.check_present(name)
        entry = self.foreign.entries[name]
        total = sum(num_rows for _, num_rows, _ in parts)
        if not entry.shape or entry.shape[0] != total:
            raise UserError(
                f"{self.foreign.folder}: tensor {name!r} has the shape {list(entry.shape)}, but its config needs "
                f"{total} rows."
            )
        first = 0
        for new_name, num_rows, factors in parts:
            piece = Piece(name, first, num_rows, factors)
            self._add(new_name, NewTensor(entry.dtype, (num_rows, *entry.shape[1:]), (piece,)))
            first += num_rows
        self._used.add(name)

    def constant(self, new_name: str, dtype: str, shape: tuple[int, ...], value: float) -> None:
        """Add a tensor whose values are all the same."""
        piece = Piece(constant=value, num_values=math.prod(shape))
        self._add(new_name, NewTensor(dtype, shape, (piece,)))

    def reads(
        self, sites: Iterable[tuple[str, str] | None], width: int, query_factors: Mapping[str, float] | None = None
    ) -> None:
        """Stack queries and key norms of all sites to the rows of `DepthReads`.

        Args:
            sites: names of query and key norm of every site; `None` gives a query of zero and a key norm of one.
            width: hidden size of the model.
            query_factors: factors of queries by their names.

        Raises:
            UserError: if one is missing or has another size.
        """
        query_factors = query_factors or {}
        queries: list[Piece] = []
        norms: list[Piece] = []
        for names in sites:
            for rows, name, default in zip((queries, norms), names or (None, None), (0.0, 1.0), strict=True):
                if name is None:
                    rows.append(Piece(constant=default, num_values=width))
                    continue
                self.check_present(name)
                entry = self.foreign.entries[name]
                if math.prod(entry.shape) != width:
                    raise UserError(
                        f"{self.foreign.folder}: tensor {name!r} has the shape {list(entry.shape)}, not the {width} "
                        "values of a query or key norm."
                    )
                rows.append(Piece(name, factors=query_factors.get(name)))
                self._used.add(name)
        for leaf, rows in (("query", queries), ("key_norm", norms)):
            self._add(f"model.{DEPTH_READS}.{leaf}", NewTensor("F32", (len(rows), width), tuple(rows)))

    def scalar(self, name: str) -> float:
        """Return the value of a tensor with one element, which becomes part of others.

        Raises:
            UserError: if the source does not have it, or it has more elements.
        """
        self.check_present(name)
        self._used.add(name)
        return self.foreign.scalar(name)

    def drop(self, name: str, reason: str) -> None:
        """Leave a tensor out, if the source has it.

        Args:
            name: its name in the source.
            reason: why the new checkpoint does not need it.
        """
        if name in self.foreign.entries:
            self.dropped[name] = reason
            self._used.add(name)

    def rename(self, renaming: Renaming) -> None:
        """Copy all tensors that were not used yet under their new names.

        Args:
            renaming: the names.

        Raises:
            UserError: if a tensor has no new name; leaving it out would change the model.
        """
        for name in self.rest():
            if COMPUTED.search(name):
                self.drop(name, "computed by the model")
                continue
            new_name = renaming.new_name(name)
            if new_name is not None:
                self.copy(name, new_name)
        if left := self.rest():
            raise UserError(
                f"{self.foreign.folder}: has tensors that the format does not have ({few(left)}); leaving them out "
                "would change the model."
            )

    def rest(self) -> list[str]:
        """Return the tensors of the source that were not used yet."""
        return [name for name in self.foreign.entries if name not in self._used]

    def check_present(self, name: str) -> None:
        """Check that the source has a tensor.

        Raises:
            UserError: if it does not.
        """
        if name not in self.foreign.entries:
            raise UserError(f"{self.foreign.folder}: lacks the tensor {name!r}.")

    def _add(self, new_name: str, tensor: NewTensor) -> None:
        if new_name in self.tensors:
            raise UserError(f"{self.foreign.folder}: has two tensors for {new_name!r}.")
        self.tensors[new_name] = tensor
