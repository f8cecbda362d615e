"""Whether Triton can be used: the one place that asks for its version."""

from __future__ import annotations

import re

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
