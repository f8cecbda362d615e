"""Tensors that know their coefficients: of which sources, and with which factors, a tensor of a depth state consists.

A `MixedTensor` behaves like its value in everything that sites compute. Through operations that are linear in it, such
as sums and products with plain tensors, it also carries its coefficients, one per channel:

    x = sum_j c_j v_j + c_constant

A nonlinear operation (norm, tanh, softmax) returns a plain tensor, so that everything computed from it is a constant
factor: these are the coefficients of the token at hand, frozen. An RMSNorm is a product with the frozen 1 / rms. Plain
tensors in sums (biases, learned vectors that are read like a source) are part of the constant. Changes in place have
no rule, since depth states are never changed.

This needs no knowledge of the connection. An operation without a rule also returns a plain tensor; where it is part of
the path of the sources, the coefficients are then wrong, which the caller sees by comparing the sum with x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

#: Operations on one tensor: selections, shapes, copies and sums.
_SELECTIONS = {"__getitem__", "chunk", "index_select", "narrow", "select", "split", "unbind"}
_SHAPES = {
    "expand",
    "expand_as",
    "flatten",
    "repeat",
    "repeat_interleave",
    "reshape",
    "unflatten",
    "unsqueeze",
    "view",
}
_ORDERS = {"flip", "movedim", "permute", "roll", "squeeze", "swapaxes", "t", "transpose"}
_OTHERS = {"clone", "contiguous", "detach", "mean", "neg", "sum"}
_LINEAR = _SELECTIONS | _SHAPES | _ORDERS | _OTHERS
#: Operations whose second argument only gives a shape or a dtype.
_LIKE = {"expand_as", "type_as"}
#: Changes of dtype, in which coefficients take no part.
_CASTS = {"bfloat16", "double", "float", "half", "to", "type_as"}
#: Sums of the first two arguments.
_SUMS = {"__rsub__", "add", "rsub", "sub"}
#: Arrangements of a list of tensors.
_OF_LISTS = {"cat", "concat", "stack"}
#: Products of two arguments, one of which must be plain.
_PRODUCTS = {"__rmatmul__", "bmm", "einsum", "matmul", "mul", "multiply", "mv"}
#: Quotients, whose second argument must be plain.
_QUOTIENTS = {"div", "divide", "true_divide"}
#: Sums of the first argument and a product of the next two, one of which must be plain.
_SUMS_WITH_PRODUCT = {"addbmm", "addcmul", "addmm", "baddbmm"}


class MixedTensor(Tensor):
    """A tensor `x = sum_j c_j v_j + c_constant` that knows its coefficients.

    Attributes:
        find_coefficients: function that returns the coefficients, `[number of sources + 1, *x.shape]` in float64, the
            constant last. It is called only for those that are needed.
    """

    find_coefficients: Callable[[], Tensor]
    _coefficients: Tensor | None

    @classmethod
    def of(cls, value: Tensor, find_coefficients: Callable[[], Tensor]) -> MixedTensor:
        """Return a tensor with this value.

        Args:
            value: x.
            find_coefficients: as the attribute.
        """
        mixed = value.as_subclass(cls)
        mixed.find_coefficients = find_coefficients
        mixed._coefficients = None
        return mixed

    @classmethod
    def source(cls, value: Tensor, index: int, num_sources: int) -> MixedTensor:
        """Return a source.

        Args:
            value: v_index.
            index: its index.
            num_sources: number of all sources.
        """
        return cls.of(value, lambda: _only(index, torch.ones_like(value, dtype=torch.float64), num_sources + 1))

    @property
    def coefficients(self) -> Tensor:
        """c, `[number of sources + 1, *x.shape]` in float64, the constant last."""
        with torch._C.DisableTorchFunctionSubclass():
            if self._coefficients is None:
                self._coefficients = self.find_coefficients()
            return self._coefficients

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        plain = [leaf.as_subclass(Tensor) if isinstance(leaf, MixedTensor) else leaf for leaf in leaves]
        with torch._C.DisableTorchFunctionSubclass():
            plain_args, plain_kwargs = tree_unflatten(plain, spec)
            result = func(*plain_args, **plain_kwargs)
            rule = _rule(func, args, kwargs or {})
            if rule is None:
                return result
            if not isinstance(result, tuple | list):
                return cls.of(result, rule)
            parts: list[Tensor] = []

            def part(index: int) -> Tensor:
                if not parts:
                    parts.extend(rule())
                return parts[index]

            return type(result)(cls.of(x, partial(part, index)) for index, x in enumerate(result))


def coefficients_of(x: Tensor) -> Tensor:
    """Return the coefficients of a tensor, `[number of sources + 1, *x.shape]` in float64, the constant last.

    Args:
        x: the result of linear operations on sources.

    Raises:
        ValueError: if it is a plain tensor.
    """
    if not isinstance(x, MixedTensor):
        raise ValueError("x: is a plain tensor; it depends on the sources by a nonlinear or unknown operation")
    return x.coefficients


def _only(index: int, value: Tensor, length: int) -> Tensor:
    coefficients = value.new_zeros(length, *value.shape, dtype=torch.float64)
    coefficients[index] = value
    return coefficients


def _rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """Return a function that computes the coefficients of a result, or `None` if the result is plain."""
    name = getattr(func, "__name__", "")
    if name in _LIKE and isinstance(args[0], MixedTensor):
        args = (args[0], args[1].as_subclass(Tensor))
    mixed = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, MixedTensor)]
    is_first = len(mixed) == 1 and mixed[0] is args[0]
    if name == "rms_norm" and is_first:
        return lambda: _normed(*args, **kwargs)
    if name in _CASTS and is_first:
        return lambda: mixed[0].coefficients
    if (name in _LINEAR or name in _QUOTIENTS) and is_first:
        return lambda: _applied(func, args, {key: value for key, value in kwargs.items() if key != "dtype"})
    if name == "linear" and is_first:
        return lambda: _linear(*args, **kwargs)
    if name in _PRODUCTS and len(mixed) == 1:
        return lambda: _applied(func, args, kwargs)
    if name in _SUMS:
        return lambda: _applied(func, (*_all_mixed(args[:2], mixed[0]), *args[2:]), kwargs)
    if name in _OF_LISTS:
        return lambda: _applied(func, (_all_mixed(args[0], mixed[0]), *args[1:]), kwargs)
    if name in _SUMS_WITH_PRODUCT and is_first:
        product = func(torch.zeros_like(args[0].as_subclass(Tensor)), *args[1:], **kwargs)
        return lambda: _applied(torch.add, tuple(_all_mixed((args[0], product), mixed[0])), {})
    if name in _SUMS_WITH_PRODUCT and sum(isinstance(factor, MixedTensor) for factor in args[1:3]) == 1:
        return lambda: _applied(func, (*_all_mixed(args[:1], mixed[0]), *args[1:]), kwargs)
    if name == "lerp" and not isinstance(args[2], MixedTensor):
        return lambda: _applied(func, (*_all_mixed(args[:2], mixed[0]), args[2]), kwargs)
    return None


def _all_mixed(terms: Any, like: MixedTensor) -> list[MixedTensor]:
    """Return the terms of a sum with coefficients; a plain term is a constant."""
    length = len(like.coefficients)

    def constant(term: Any) -> MixedTensor:
        value = torch.as_tensor(term, dtype=torch.float64, device=like.device)
        return MixedTensor.of(value, lambda: _only(-1, value, length))

    return [term if isinstance(term, MixedTensor) else constant(term) for term in terms]


def _applied(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply an operation to the coefficients of each source, with plain tensors in float64."""
    leaves, spec = tree_flatten((args, kwargs))
    positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, MixedTensor)]
    wide = [_wide(leaf) for leaf in leaves]
    # Coefficients may have other strides than their tensor.
    func = Tensor.reshape if getattr(func, "__name__", "") == "view" else func

    def of_one_source(*coefficients: Tensor) -> Any:
        given = list(wide)
        for position, value in zip(positions, coefficients, strict=True):
            given[position] = value
        given_args, given_kwargs = tree_unflatten(given, spec)
        return func(*given_args, **given_kwargs)

    return torch.vmap(of_one_source)(*(leaves[position].coefficients for position in positions))


def _wide(leaf: Any) -> Any:
    is_plain = isinstance(leaf, Tensor) and not isinstance(leaf, MixedTensor)
    return leaf.double() if is_plain and leaf.is_floating_point() else leaf


def _linear(x: MixedTensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    coefficients: Tensor = x.coefficients @ weight.double().t()
    if bias is not None:
        coefficients[-1] += bias.double()
    return coefficients


def _normed(x: MixedTensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    mean_square = x.as_subclass(Tensor).double().square().mean(dims, keepdim=True)
    factor = torch.rsqrt(mean_square + (torch.finfo(x.dtype).eps if eps is None else eps))
    return x.coefficients * (factor if weight is None else factor * weight.double())
