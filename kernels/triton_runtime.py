"""Whether Triton can be used: the one place that asks for its version and for a device it runs on."""

from __future__ import annotations

import re

import torch

try:
    import triton
except ImportError:
    triton = None


def triton_version() -> tuple[int, ...] | None:
    """Version numbers of the installed Triton, for example `(3, 9, 0)`; None where it does not import."""
    if triton is None:
        return None
    release = re.match(r"\d+(?:\.\d+)*", triton.__version__)
    assert release is not None, f"Triton reports the version {triton.__version__!r}"
    return tuple(int(number) for number in release.group().split("."))


def triton_available(device: torch.device | str) -> bool:
    """Whether Triton kernels can run on `device`.

    Args:
        device: the device of the tensors; CUDA and ROCm (HIP) devices both have the torch type `"cuda"`.
    """
    return triton is not None and torch.device(device).type == "cuda" and torch.cuda.is_available()
