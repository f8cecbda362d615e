"""`hf_depthattn.kernels.triton_runtime`, with and without Triton."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

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
    assert triton_runtime.triton_version() is None
