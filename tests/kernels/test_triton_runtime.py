"""`hf_depthattn.kernels.triton_runtime`, with and without Triton and a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_depthattn.kernels import triton_runtime


@pytest.mark.parametrize(
    ("reported", "expected"),
    [("3.9.0", (3, 9, 0)), ("3.5.1+gitabc123", (3, 5, 1)), ("3.10.0.dev20261101", (3, 10, 0)), ("4.0rc1", (4, 0))],
)
def test_version_is_a_tuple_of_numbers(monkeypatch, reported, expected):
    monkeypatch.setattr(triton_runtime, "triton", SimpleNamespace(__version__=reported))
    assert triton_runtime.triton_version() == expected


def test_without_triton(monkeypatch):
    monkeypatch.setattr(triton_runtime, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert triton_runtime.triton_version() is None
    assert not triton_runtime.triton_available("cuda")


@pytest.mark.parametrize(
    ("device", "gpu", "expected"),
    [
        ("cuda", True, True),
        ("cuda:1", True, True),
        ("cuda", False, False),
        ("cpu", True, False),
        ("meta", True, False),
    ],
)
def test_triton_needs_a_gpu_device(monkeypatch, device, gpu, expected):
    monkeypatch.setattr(triton_runtime, "triton", SimpleNamespace(__version__="3.9.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert triton_runtime.triton_available(device) is expected
    assert triton_runtime.triton_available(torch.device(device)) is expected
