"""A folder with results of certain settings, in which an interrupted command continues.

Files are complete when they have their names (`result_files`). A folder with results of other settings, or with
anything else in it, is refused; `--overwrite` removes the command's own files and leaves others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError
from ..utils.result_files import json_text, read_object, write_text


@dataclass(frozen=True, slots=True)
class RunLayout:
    """The files of a command.

    Args:
        content: what the folder holds, in messages: `"run"`.
        settings_file: the name of a file with settings.
        required_settings: those that every run has; without them a file of this name is another program's.
        without_results: names of files beside the settings that hold no results: nothing is lost with them.
        own_files: patterns of all files, which `--overwrite` removes.
    """

    content: str
    settings_file: str
    required_settings: frozenset[str]
    own_files: tuple[str, ...]
    without_results: tuple[str, ...] = ()


class RunFolder:
    """See the module.

    Args:
        path: the folder.
        layout: its files.
        settings: part -> what decides the numbers, as JSON values. A part is a folder inside this one, `"."` where
            there is only one; the first is in every run.
        overwrite: discard another run in the folder.

    Raises:
        UserError: the folder holds a run with other settings, or something else.
    """

    def __init__(
        self, path: Path, layout: RunLayout, settings: Mapping[str, Mapping[str, Any]], *, overwrite: bool
    ) -> None:
        self.path = path
        self._layout = layout
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: exists and is not a folder.")
        if self._holds_run(next(iter(settings))) and overwrite:
            self.clear()
        for part, wanted in settings.items():
            self._check(part, wanted)
        for part, wanted in settings.items():
            self.write(f"{part}/{layout.settings_file}", wanted)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON object, None where there is no such file.

        Args:
            name: of the file, relative to the folder.

        Raises:
            UserError: it holds something else.
        """
        file = self.path / name
        return read_object(file, advice="remove it, or --overwrite starts afresh") if file.is_file() else None

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON object.

        Args:
            name: of the file, relative to the folder.
            content: the object.
        """
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json_text(content))

    def clear(self) -> None:
        """Remove what a run consists of; other files in the folder stay."""
        for pattern in self._layout.own_files:
            for file in self.path.glob(pattern):
                file.unlink()

    def _holds_run(self, first_part: str) -> bool:
        """Whether the folder holds a run.

        Raises:
            UserError: something else does; it is never cleared.
        """
        settings_file = self.path / first_part / self._layout.settings_file
        if not settings_file.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise UserError(
                    f"{self.path}: is not empty and holds no {self._layout.content}; choose another folder (--out)."
                )
            return False
        if not self._layout.required_settings <= read_object(settings_file).keys():
            raise UserError(f"{settings_file}: belongs to another program; choose another folder (--out).")
        return True

    def _check(self, part: str, wanted: Mapping[str, Any]) -> None:
        before = self.read(f"{part}/{self._layout.settings_file}")
        if before is None or before == wanted:
            return
        if self._has_results(part):
            name = PurePosixPath(part).name
            holds = f"a {self._layout.content} {f'whose {name} has' if name else 'with'}"
            refuse_other_settings(self.path, holds, before, wanted, "choose another folder (--out), or --overwrite")
        # Left by a model that could not be loaded.
        for name in self._layout.without_results:
            (self.path / part / name).unlink(missing_ok=True)

    def _has_results(self, part: str) -> bool:
        ignored = {self._layout.settings_file, *self._layout.without_results}
        return any(file.is_file() and file.name not in ignored for file in (self.path / part).iterdir())


def refuse_other_settings(
    place: Path, holds: str, before: Mapping[str, Any], wanted: Mapping[str, Any], advice: str
) -> None:
    """Refuse to continue with settings that are not those of the results that are there.

    Args:
        place: the folder or file.
        holds: what it holds, up to the name of the setting: `"a run with"`.
        before: the settings of the results that it holds.
        wanted: those that were given.
        advice: what to do.

    Raises:
        UserError: a setting differs.
    """
    for name in {**before, **wanted}:
        if before.get(name) != wanted.get(name):
            raise UserError(f"{place}: holds {holds} {name} {before.get(name)}, not {wanted.get(name)}; {advice}.")
