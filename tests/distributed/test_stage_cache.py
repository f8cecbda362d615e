"""The cache of a rank: leaves of their own for every stage, gradients summed for the owner, nothing left."""

import pytest
import torch

from hf_depthattn.distributed.depth_items import StateItem
from hf_depthattn.distributed.stage_cache import StageCache

ITEM, OTHER = StateItem("source", 1), StateItem("source", 2)


class Meta:
    def __init__(self, requires_grad: bool):
        self.requires_grad = requires_grad


@pytest.fixture
def cache() -> StageCache:
    cache = StageCache()
    cache.metas = {ITEM: Meta(True), OTHER: Meta(False)}
    return cache


def two_stages(cache: StageCache, take):
    """The stage that makes an item, and a later one of the same rank, backwards in the order of a schedule."""
    weight, later_weight = (torch.tensor(value, requires_grad=True) for value in (2.0, 5.0))
    made = weight * weight
    cache.keep(0, [(ITEM, made)])
    taken = take(made)
    (later_weight * taken).backward()
    cache.deposit(0, [(ITEM, taken.grad if taken.is_leaf else None)])
    cache.drop(0, [ITEM])
    made.backward(cache.withdraw(0, ITEM, torch.tensor(1.0)))
    return weight.grad, later_weight.grad


def test_gradients_of_later_stages_join_that_of_the_owner(cache):
    gradient, later = two_stages(cache, lambda made: cache.leaves(0, [ITEM], True)[0])
    # d(w^2 + 5 w^2)/dw
    assert (gradient.item(), later.item()) == (24.0, 4.0)
    assert not cache.tensors and not cache.gradients


def test_a_tensor_that_is_not_detached_breaks_the_backward(cache):
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        two_stages(cache, lambda made: made)


def test_leaves_need_a_gradient_where_their_owner_sends_one(cache):
    cache.keep(0, [(ITEM, torch.ones(2)), (OTHER, torch.ones(2))])
    assert [leaf.requires_grad for leaf in cache.leaves(0, [ITEM, OTHER], True)] == [True, False]
    assert not any(leaf.requires_grad for leaf in cache.leaves(0, [ITEM, OTHER], False))


def test_leaves_of_two_stages_are_apart_and_microbatches_too(cache):
    for microbatch in (0, 1):
        cache.keep(microbatch, [(ITEM, torch.full((2,), float(microbatch)))])
    first, second = (cache.leaves(0, [ITEM], True)[0] for _ in range(2))
    assert first is not second and first.data_ptr() == second.data_ptr()
    cache.deposit(0, [(ITEM, torch.ones(2)), (OTHER, None)])
    cache.deposit(0, [(ITEM, torch.ones(2))])
    assert cache.withdraw(1, ITEM, None) is None
    assert cache.withdraw(0, ITEM, None).tolist() == [2.0, 2.0]
    assert cache.leaves(1, [ITEM], True)[0].tolist() == [1.0, 1.0]
    cache.clear()
    assert not cache.tensors and not cache.gradients


def test_a_deposit_does_not_change_a_gradient_in_place(cache):
    gradient = torch.ones(2)
    for _ in range(2):
        cache.deposit(0, [(ITEM, gradient)])
    assert gradient.tolist() == [1.0, 1.0]
    assert cache.withdraw(0, ITEM, gradient).tolist() == [3.0, 3.0]
