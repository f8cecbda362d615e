"""The version of Triton, if it is installed."""

from __future__ import annotations

import re

try:
    import triton
except ImportError:
    triton = None


def triton_version() -> tuple[int, ...] | None:
    """Return the version of the installed Triton, for example `(3, 9, 0)`, or None if it cannot be imported."""
    if triton is None:
        return None
    release = re.match(r"\d+(?:\.\d+)*", triton.__version__)
    assert release is not None, f"Triton reports the version {triton.__version__!r}"
    return tuple(int(number) for number in release.group().split("."))
