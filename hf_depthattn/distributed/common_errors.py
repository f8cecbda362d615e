"""Errors that every process raises: if one raised alone, the others would wait for it."""

from __future__ import annotations

import torch.distributed as dist

from ..errors import UserError


def first_problem(problem: str | None) -> str | None:
    """Return the first problem of any process, `None` if all is well; all processes call it.

    Args:
        problem: what this process has found, `None` if all is well.
    """
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((each for each in problems if each is not None), None)


def raise_in_all(problem: str | None) -> None:
    """Raise the first problem of any process in all of them; all processes call it.

    Args:
        problem: what this process has found, `None` if all is well.

    Raises:
        UserError: if any process has a problem.
    """
    if (first := first_problem(problem)) is not None:
        raise UserError(first)
