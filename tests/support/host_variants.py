"""Tests over hosts times variants: the quick tests run each host once, the slow ones the rest."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def hosts_with_variants(hosts: Iterable[str], variants: Sequence[Any]) -> list:
    """Return parameters (host, variant) of a test: a host has one variant in turn, and the others are slow.

    Args:
        hosts: model types.
        variants: values of the second parameter, of which every one suits every host.
    """
    return [
        pytest.param(host, variant, id=f"{host}-{_name(variant)}", marks=() if quick else pytest.mark.slow)
        for number, host in enumerate(hosts)
        for index, variant in enumerate(variants)
        for quick in (index == number % len(variants),)
    ]


def _name(variant: Any) -> str:
    return getattr(variant, "__name__", str(variant))
