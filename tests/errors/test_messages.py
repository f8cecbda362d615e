"""What a command says about an error: one line for what the user can put right, nothing for a bug."""

import json

import pytest

from hf_depthattn.errors import UserError
from hf_depthattn.errors.messages import one_line, printable, user_error


def test_the_innermost_cause_is_told_on_one_line():
    try:
        try:
            raise ValueError("field:\n  is wrong")
        except ValueError as inner:
            raise RuntimeError("validation failed") from inner
    except RuntimeError as error:
        assert one_line(error) == "field: is wrong"


def test_an_error_without_a_message_is_told_by_its_name():
    assert one_line(KeyError()) == "KeyError"


def test_characters_that_steer_a_terminal_are_shown():
    assert printable("a\x1b[2Jb\tc") == "a\\x1b[2Jb c"


@pytest.mark.parametrize(
    "error",
    [
        UserError("num_blocks: 0 must be at least 1."),
        FileNotFoundError(2, "No such file or directory", "model/config.json"),
        MemoryError("4 TB"),
        RecursionError("maximum recursion depth exceeded"),
        json.JSONDecodeError("Expecting value", "{", 1),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_mistakes_of_users_are_one_line(error):
    message = user_error(error)
    assert message and "\n" not in message


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AssertionError(), RuntimeError("shape mismatch")])
def test_bugs_have_no_message(error):
    assert user_error(error) is None
