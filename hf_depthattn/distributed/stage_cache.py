"""What the pipeline stages of one rank share: tensors for later forwards, and gradients for earlier backwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .depth_items import StateItem


class StageCache:
    """The cache of one rank for cross-stage caching (Attention Residuals, arXiv 2603.15031, section 4.1).

    The first stage of the rank that has an item, received or made, owns it and keeps it here. Later stages of the rank
    take it from here as a leaf of their own, detached: their backwards run before that of the owner and leave the
    gradients of these leaves here, which the owner adds to its own gradient of the item. So every gradient returns
    once, on the way on which the tensor came.

    Attributes:
        metas: shape, strides, dtype and `requires_grad` of every item that a stage of the rank has had. All leaves of
            an item require a gradient or none does.
        tensors: the kept tensors of every microbatch.
        gradients: the sums of gradients of every microbatch.
    """

    def __init__(self):
        self.metas: dict[StateItem, Any] = {}
        self.tensors: dict[int, dict[StateItem, Tensor]] = {}
        self.gradients: dict[int, dict[StateItem, Tensor]] = {}

    def keep(self, microbatch: int, items: Iterable[tuple[StateItem, Tensor]]) -> None:
        """Keep tensors for later stages.

        Args:
            microbatch: its index.
            items: items with their tensors.
        """
        for item, tensor in items:
            self.tensors.setdefault(microbatch, {})[item] = tensor.detach()

    def leaves(self, microbatch: int, items: Iterable[StateItem], needs_grad: bool) -> tuple[Tensor, ...]:
        """Return items as new leaves.

        Args:
            microbatch: its index.
            items: the items.
            needs_grad: whether there will be a backward pass.
        """
        # Without `detach`, the backward of this stage would run through the graph of the stage that made the tensor.
        return tuple(
            self.tensors[microbatch][item].detach().requires_grad_(needs_grad and self.metas[item].requires_grad)
            for item in items
        )

    def drop(self, microbatch: int, items: Iterable[StateItem]) -> None:
        """Drop tensors that no later stage takes.

        Args:
            microbatch: its index.
            items: the items.
        """
        held = self.tensors.get(microbatch, {})
        for item in items:
            del held[item]
        if not held:
            self.tensors.pop(microbatch, None)

    def deposit(self, microbatch: int, items: Iterable[tuple[StateItem, Tensor | None]]) -> None:
        """Add gradients for the owners of items.

        Args:
            microbatch: its index.
            items: items with the gradients of a stage; `None` for those without.
        """
        for item, gradient in items:
            if gradient is not None:
                held = self.gradients.setdefault(microbatch, {})
                held[item] = held[item] + gradient if item in held else gradient

    def withdraw(self, microbatch: int, item: StateItem, gradient: Tensor | None) -> Tensor | None:
        """Return the gradient of an item with that of later stages, which is then dropped.

        Args:
            microbatch: its index.
            item: an item that the calling stage owns.
            gradient: its gradient in this stage.
        """
        held = self.gradients.get(microbatch, {})
        deposited = held.pop(item, None)
        if not held:
            self.gradients.pop(microbatch, None)
        if gradient is None or deposited is None:
            return deposited if gradient is None else gradient
        return gradient + deposited

    def clear(self) -> None:
        """Drop all tensors and gradients, which are left only after an interrupted step."""
        self.tensors.clear()
        self.gradients.clear()
