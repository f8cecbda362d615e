"""Errors that every process raises: if one raised alone, the others would wait for it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ..errors import UserError


def raise_in_all(problem: str | None) -> None:
    """Raise the first problem of any process in all of them; all processes call it.

    Args:
        problem: what this process has found, `None` if all is well.

    Raises:
        UserError: if any process has a problem.
    """
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if (first := next((each for each in problems if each is not None), None)) is not None:
        raise UserError(first)
