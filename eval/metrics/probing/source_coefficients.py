"""Tensors that know their coefficients: of which sources, and with which factors, a tensor of a depth state consists.

A `MixedTensor` behaves like its value in everything that sites compute. Through operations that are linear in it, such
as sums and products with plain tensors, it also carries its coefficients c_j with x = sum_j c_j v_j, one per channel.
A nonlinear operation (norm, tanh, softmax) returns a plain tensor, so that everything computed from it is a constant
factor: these are the coefficients of the token at hand, frozen. An RMSNorm is a product with the frozen 1 / rms.

This needs no knowledge of the connection. An operation without a rule also returns a plain tensor; where it is part of
the path of the sources, the coefficients are then wrong, which the caller sees by comparing `sum_j c_j v_j` with x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

#: Operations on one tensor that select, copy, arrange or sum entries.
_LINEAR = frozenset(
    """__getitem__ __neg__ neg chunk clone contiguous detach expand expand_as flatten flip index_select mean movedim
    narrow permute repeat repeat_interleave reshape roll select split squeeze sum swapaxes transpose unbind unflatten
    unsqueeze view""".split()
)
#: Changes of dtype, which coefficients do not take part in.
_CASTS = frozenset("bfloat16 double float half to type_as".split())
#: Sums of the first two arguments; a constant in a sum has no coefficients.
_SUMS = frozenset("__add__ __iadd__ __radd__ __rsub__ __sub__ add rsub sub".split())
#: Sums, or other arrangements, of a list of tensors.
_OF_LISTS = frozenset("cat concat stack".split())
#: Products of two arguments, one of which must be plain.
_PRODUCTS = frozenset("__matmul__ __mul__ __rmatmul__ __rmul__ bmm einsum linear matmul mul multiply mv".split())
#: Quotients, whose second argument must be plain.
_QUOTIENTS = frozenset("__truediv__ div divide true_divide".split())


class MixedTensor(Tensor):
    """A tensor `x = sum_j c_j v_j` that knows its coefficients.

    Attributes:
        find_coefficients: function that returns the coefficients, `[number of sources, *x.shape]` in float64. It is
            called only for those that are needed.
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

        def unit() -> Tensor:
            coefficients = torch.zeros(num_sources, *value.shape, dtype=torch.float64, device=value.device)
            coefficients[index] = 1.0
            return coefficients

        return cls.of(value, unit)

    @property
    def coefficients(self) -> Tensor:
        """c, `[number of sources, *x.shape]` in float64."""
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
            if isinstance(result, tuple | list):
                whole: list[Any] = []
                return type(result)(
                    cls.of(part, lambda index=index: _once(whole, rule)[index]) for index, part in enumerate(result)
                )
            return cls.of(result, rule)


def coefficients_of(x: Tensor) -> Tensor:
    """Return the coefficients of a tensor.

    Args:
        x: the result of linear operations on sources.

    Raises:
        ValueError: if it is a plain tensor.
    """
    if not isinstance(x, MixedTensor):
        raise ValueError("x: is a plain tensor; it depends on the sources by a nonlinear or unknown operation")
    return x.coefficients


def _once(memory: list[Any], rule: Callable[[], Any]) -> Any:
    if not memory:
        memory.append(rule())
    return memory[0]


def _rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """Return a function that computes the coefficients of a result, or `None` if the result is plain."""
    name = getattr(func, "__name__", "")
    mixed = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, MixedTensor)]
    if name == "rms_norm":
        return lambda: _normed(*args, **kwargs)
    if name in _CASTS and isinstance(args[0], MixedTensor):
        return lambda: args[0].coefficients
    if name in _LINEAR and len(mixed) == 1 and mixed[0] is args[0]:
        kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
        return lambda: _applied(func, args, kwargs)
    if name in _SUMS:
        if all(isinstance(term, MixedTensor) for term in args[:2]):
            return lambda: _applied(func, args, kwargs)
        return lambda: _applied(func, (*map(_without_constant, args[:2]), *args[2:]), kwargs)
    if name in _OF_LISTS:
        return lambda: _applied(func, ([*map(_without_constant, args[0])], *args[1:]), kwargs)
    if name in _PRODUCTS and len(mixed) == 1:
        # The bias of a linear layer is a constant.
        given = args[:2] if name == "linear" else args
        return lambda: _applied(func, given, {} if name == "linear" else kwargs)
    if name in _QUOTIENTS and len(mixed) == 1 and mixed[0] is args[0]:
        return lambda: _applied(func, args, kwargs)
    if name == "addcmul" and sum(isinstance(factor, MixedTensor) for factor in args[1:3]) == 1:
        return lambda: _applied(func, (_without_constant(args[0]), *args[1:]), kwargs)
    if name == "lerp" and not isinstance(args[2], MixedTensor):
        return lambda: _applied(func, (*map(_without_constant, args[:2]), args[2]), kwargs)
    return None


def _without_constant(term: Any) -> Any:
    """Return a term of a sum; a constant is replaced by 0, of the same shape."""
    if isinstance(term, MixedTensor):
        return term
    return torch.zeros_like(term) if isinstance(term, Tensor) else 0.0


def _wide(leaf: Any) -> Any:
    is_plain = isinstance(leaf, Tensor) and not isinstance(leaf, MixedTensor)
    return leaf.double() if is_plain and leaf.is_floating_point() else leaf


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


def _normed(x: MixedTensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    mean_square = x.as_subclass(Tensor).double().square().mean(dims, keepdim=True)
    factor = torch.rsqrt(mean_square + (torch.finfo(x.dtype).eps if eps is None else eps))
    return x.coefficients * (factor if weight is None else factor * weight.double())
