"""Choosing an implementation: by device, by limit, by the user, and never another one than was asked for."""

import dataclasses

import pytest
import torch

from hf_depthattn import op_dispatch
from hf_depthattn.op_dispatch import Op, register, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def in_torch() -> None: ...


def in_triton() -> None: ...


@pytest.fixture
def op(monkeypatch):
    """An op of both implementations that takes even numbers in Triton, on a machine that has Triton."""
    monkeypatch.setattr(op_dispatch, "OPS", {})
    monkeypatch.setattr(op_dispatch, "_HAS_TRITON", True)
    return register(Op("op", in_torch, in_triton, lambda number: "odd" if number % 2 else None))


def test_auto_takes_triton_on_a_gpu_where_it_can(op):
    assert resolve(op, "auto", CUDA, (2,)) is in_triton
    assert resolve(op, "auto", CUDA, (3,)) is in_torch
    assert resolve(op, "auto", CPU, (2,)) is in_torch


def test_torch_is_torch_everywhere(op):
    assert resolve(op, "torch", CUDA, (2,)) is resolve(op, "torch", CPU, (2,)) is in_torch


def test_triton_is_triton_or_an_error(op, monkeypatch):
    assert resolve(op, "triton", CPU, (2,)) is in_triton
    with pytest.raises(RuntimeError, match=r"impl='triton'.*'op'.*odd"):
        resolve(op, "triton", CUDA, (3,))
    monkeypatch.setattr(op_dispatch, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton"):
        resolve(op, "triton", CUDA, (2,))
    assert resolve(op, "auto", CUDA, (2,)) is in_torch


def test_an_op_without_a_kernel_runs_in_torch(op):
    alone = register(Op("alone", in_torch))
    assert resolve(alone, "auto", CUDA, ()) is in_torch
    with pytest.raises(RuntimeError, match="'alone'"):
        resolve(alone, "triton", CUDA, ())


def test_the_row_in_the_registry_counts(op):
    op_dispatch.OPS["op"] = dataclasses.replace(op, triton_impl=print)
    assert resolve(op, "auto", CUDA, (2,)) is print


def test_other_names_of_implementations_are_errors(op):
    with pytest.raises(ValueError, match=r"`impl` must be one of.*'cuda'"):
        resolve(op, "cuda", CPU, (2,))


def test_the_ops_of_the_models_are_registered_under_their_names():
    import hf_depthattn.modeling_depthattn  # noqa: F401

    assert {
        "attn_res_read",
        "attn_res_phase1",
        "attn_res_phase2",
        "moda_depth_forward",
        "moda_depth_backward",
    } <= op_dispatch.OPS.keys()
    assert all(name == op.name for name, op in op_dispatch.OPS.items())
