"""Suites: groups of lm-eval tasks, with the metric that tables show for each benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...utils.paths import read_text

#: Folder with the files of our tasks, except generated ones (`task_files`).
TASKS_FOLDER = Path(__file__).parent.parent / "tasks"
SUITES = ("attnres", "moda", "ppl", "small")
LOCAL_SUFFIX = "_local"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark of a suite, i.e. a row of its table.

    Attributes:
        benchmark: name in the paper.
        task: key in lm-eval's results.
        metric: metric and filter in lm-eval's results, e.g. `"acc,none"`.
        source: where the number of shots and the metric come from.
    """

    benchmark: str
    task: str
    metric: str
    source: str


@dataclass(frozen=True, slots=True)
class Suite:
    """A group of tasks.

    Attributes:
        name: name in `SUITES`.
        group: name of the group in lm-eval.
        benchmarks: benchmarks of the suite.
        missing: benchmarks of the paper without a task, with the reason.
        members: entries of the group, as in the YAML file.
    """

    name: str
    group: str
    benchmarks: tuple[Benchmark, ...]
    missing: dict[str, str]
    members: tuple[str | dict[str, Any], ...]

    @property
    def is_local(self) -> bool:
        """Whether the suite only reads local data."""
        return self.group.endswith(LOCAL_SUFFIX)

    def without(self, names: Sequence[str]) -> Suite:
        """Return the suite without some benchmarks, which its table lists as missing.

        Args:
            names: benchmarks or tasks.

        Raises:
            UserError: if a name is not in this suite, or no benchmark is left.
        """
        known = {name for row in self.benchmarks for name in (row.benchmark, row.task)}
        for name in names:
            if name not in known:
                allowed = ", ".join(row.benchmark for row in self.benchmarks)
                raise UserError(f"--exclude {name}: not one of {allowed}.")
        gone = {row.task for row in self.benchmarks if row.benchmark in names or row.task in names}
        members = tuple(member for member in self.members if self._result_key(member) not in gone)
        if not members:
            raise UserError(f"--exclude {','.join(names)}: leaves nothing of the suite {self.name}.")
        benchmarks = tuple(row for row in self.benchmarks if row.task not in gone)
        excluded = {row.benchmark: "left out (--exclude)" for row in self.benchmarks if row.task in gone}
        return Suite(self.name, self.group, benchmarks, excluded | self.missing, members)

    def _result_key(self, member: str | dict[str, Any]) -> str:
        if isinstance(member, str):
            return member
        # lm-eval prefixes a group that is defined inline with the name of the suite's group.
        is_inline = "group" in member and "task" in member
        return f"{self.group}::{member['group']}" if is_inline else member.get("group") or member["task"]


def load_suite(name: str, *, local: bool) -> Suite:
    """Read a suite.

    Args:
        name: name in `SUITES`.
        local: load the variant that reads local data.

    Raises:
        UserError: if there is no such suite.
    """
    import yaml

    if name not in SUITES:
        raise UserError(f"--suite {name}: must be one of {', '.join(SUITES)}.")
    path = TASKS_FOLDER / "suites" / f"{name}{LOCAL_SUFFIX if local else ''}.yaml"
    config = yaml.safe_load(read_text(path))
    metadata = config["metadata"]
    return Suite(
        name=name,
        group=config["group"],
        benchmarks=tuple(Benchmark(**row) for row in metadata["benchmarks"]),
        missing={row["benchmark"]: row["reason"] for row in metadata.get("missing", [])},
        members=tuple(config["task"]),
    )
