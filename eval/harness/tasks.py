"""Builds lm-eval's tasks with their data."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...errors import UserError
from ...errors.messages import one_line
from .environment import need_lm_eval, prepare_environment
from .suites import LOCAL_SUFFIX, Suite
from .task_files import task_names, tasks_folder

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def is_local_data(suite: Suite | None, names: Sequence[str]) -> bool:
    """Whether tasks read local data only.

    Args:
        suite: a suite, or None.
        names: tasks, groups or tags instead of a suite.
    """
    return suite.is_local if suite else all(name.endswith(LOCAL_SUFFIX) for name in names)


def check_local_names(names: Sequence[str]) -> None:
    """Refuse local tasks that do not exist, without importing lm-eval, which takes seconds.

    Raises:
        UserError: a name that ends like those of local tasks is unknown.
    """
    wanted = [name for name in names if name.endswith(LOCAL_SUFFIX)]
    known = task_names() if wanted else frozenset()
    for name in wanted:
        if name not in known:
            raise _unknown(name)


def load_tasks(suite: Suite | None, names: Sequence[str], *, confirm_run_unsafe_code: bool = False) -> TaskManager:
    """Build tasks with their data.

    Args:
        suite: a suite, or None.
        names: tasks, groups or tags instead of a suite.
        confirm_run_unsafe_code: whether tasks that run generated code are allowed.

    Returns:
        A task manager of lm-eval that hands out these tasks.

    Raises:
        UserError: a name is unknown, data are missing, or a task runs generated code without permission.
    """
    prepare_environment()
    need_lm_eval()
    # It warns once for every task with local data and for every prompt that is too long.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    # Reading lm-eval's own 13,000 files takes ten seconds, which local tasks do without.
    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=not is_local_data(suite, names))
    if suite:
        names = [suite.group]
        entry = manager.task_index[suite.group]
        config = {**entry.cfg, "task": copy.deepcopy(list(suite.members))}
        manager.task_index[suite.group] = dataclasses.replace(entry, yaml_path=None, cfg=config)
    for name in names:
        if name not in manager.task_index:
            raise _unknown(name)
    if not confirm_run_unsafe_code:
        # Before anything is downloaded, and again for tasks inside of groups.
        members = [member for member in (suite.members if suite else names) if isinstance(member, str)]
        _refuse_unsafe(name for name in members if (manager.task_index[name].cfg or {}).get("unsafe_code"))
    with _one_line_errors(names):
        loaded = manager.load(list(names))
    if not confirm_run_unsafe_code:
        _refuse_unsafe(name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False))
    # `simple_evaluate` asks the manager for the tasks after it has built the model; a mistake would show up late.
    manager.load = lambda _: loaded
    return manager


def _refuse_unsafe(names: Iterable[str]) -> None:
    if unsafe := sorted(names):
        raise UserError(
            f"{', '.join(unsafe)}: runs code that the model writes; give --confirm_run_unsafe_code, or leave it out "
            f"(--exclude {','.join(unsafe)})."
        )


def _unknown(name: str) -> UserError:
    listed = "python -m hf_depthattn.lm_eval ls tasks"
    return UserError(f"--tasks {name}: unknown; `{listed}` lists what there is.")


@contextmanager
def _one_line_errors(names: Sequence[str]) -> Iterator[None]:
    """Failures of third parties while data are fetched: whatever it was, the user reads one line about it."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        what = f"{', '.join(names)}: needs the package {error.name}" if error.name else one_line(error)
        raise UserError(f"{what}; pip install 'lm_eval[math]' has what Math needs, or --exclude it.") from error
    except Exception as error:
        raise UserError(f"{', '.join(names)}: the data could not be loaded: {one_line(error)}") from error
