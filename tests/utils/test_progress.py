"""Progress without a terminal: lines, not too many, the last one when it is done; nothing when nothing is wanted."""

import io
import sys

import pytest

from hf_depthattn.utils import progress
from hf_depthattn.utils.progress import progress_bar


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_come_every_few_seconds_and_say_what_is_left(clock, capsys):
    for _ in progress_bar(range(40), "items", None):
        clock.seconds += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert lines[0] == "items: 5 of 40 (12 %), 5 s, about 35 s left"
    assert lines[-1] == "items: 40 of 40 (100 %), 40 s"


def test_bytes_are_shown_as_sizes(clock, capsys):
    with progress_bar(3_000_000_000, "weights", True, unit="B") as bar:
        bar.update(1_500_000_000)
        clock.seconds += 6
        bar.update(0)
        bar.update(1_500_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "weights: 1.5 GB of 3.0 GB (50 %), 6 s, about 6 s left",
        "weights: 3.0 GB of 3.0 GB (100 %), 6 s",
    ]


def test_what_is_quick_prints_nothing_unless_asked(capsys):
    assert list(progress_bar(range(3), "items", None)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress_bar(range(3), "items", True)) == [0, 1, 2]
    assert capsys.readouterr().err == "items: 3 of 3 (100 %), 0 s\n"


def test_false_prints_nothing_however_long(clock, capsys):
    for _ in progress_bar(range(40), "items", False):
        clock.seconds += 1
    assert capsys.readouterr().err == ""


def test_after_an_error_its_line_is_the_last(capsys):
    with pytest.raises(OSError), progress_bar(3, "items", True):
        raise OSError("disk full")
    assert capsys.readouterr().err == ""


def test_without_a_length_the_steps_are_counted(clock, capsys):
    for _ in progress_bar(iter(range(7)), "items", True):
        clock.seconds += 2
    assert capsys.readouterr().err.splitlines() == ["items: 3, 6 s", "items: 6, 12 s", "items: 7, 14 s"]


@pytest.mark.parametrize("shown", [None, True, False])
def test_a_terminal_gets_a_bar(shown, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress_bar(range(3), "items", shown)) == [0, 1, 2]
    assert ("100%" in terminal.getvalue()) == (shown is not False)
