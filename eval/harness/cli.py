"""lm-eval's command line with this package's model class and tasks.

lm-eval 0.4.13 has no plugin mechanism for model classes, so the class must be imported before its command line runs.
"""

from __future__ import annotations

import sys
from importlib import import_module

from .environment import need_lm_eval, prepare_environment
from .task_files import tasks_folder

_OPTION = "--include_path"
_LM_EVAL_COMMANDS = ("run", "ls", "validate")
#: Command of this package: print the folder of our tasks, to be passed to a plain `lm-eval --include_path`.
INCLUDE_PATH_COMMAND = "include-path"


def main() -> None:
    """Run lm-eval with `sys.argv`; `--include_path` defaults to the folder of our tasks.

    Raises:
        UserError: if lm-eval is not installed, or the folder of our tasks cannot be written.
    """
    prepare_environment()
    need_lm_eval()
    if sys.argv[1:] == [INCLUDE_PATH_COMMAND]:
        print(tasks_folder())
    else:
        _run_lm_eval()


def _run_lm_eval() -> None:
    sys.argv[1:] = with_include_path(sys.argv[1:])

    from lm_eval.__main__ import cli_evaluate

    # Registers `--model depthattn`.
    import_module(".model", __package__)
    cli_evaluate()


def with_include_path(arguments: list[str]) -> list[str]:
    """Return the arguments with the folder of our tasks added, for commands of lm-eval that accept one.

    If no command is given, lm-eval inserts `run`. Help texts need no folder.
    """
    given = any(argument == _OPTION or argument.startswith(f"{_OPTION}=") for argument in arguments)
    without_folder = not arguments or {"-h", "--help"} & set(arguments)
    if given or without_folder or arguments in ([name] for name in _LM_EVAL_COMMANDS):
        return arguments
    return [*arguments, _OPTION, str(tasks_folder())]
