"""lm-eval's command line with this package's model class and tasks.

lm-eval looks for neither plugins nor entry points (0.4.13), so a process has to import a model class before it starts
the command.
"""

from __future__ import annotations

import sys
from importlib import import_module

from ...errors import UserError
from .environment import need_lm_eval, prepare_environment
from .task_files import tasks_folder

_OPTION = "--include_path"
_LM_EVAL_COMMANDS = ("run", "ls", "validate")
#: Our own command, which prints the folder with our tasks for a plain `lm-eval --include_path`.
INCLUDE_PATH_COMMAND = "include-path"


def main() -> None:
    """Run lm-eval with `sys.argv`; `--include_path` is our tasks' folder unless another one is given."""
    prepare_environment()
    try:
        need_lm_eval()
        if sys.argv[1:] == [INCLUDE_PATH_COMMAND]:
            print(tasks_folder())
        else:
            _run_lm_eval()
    except UserError as error:
        print(f"hf_depthattn.lm_eval: error: {error}", file=sys.stderr)
        sys.exit(2)


def _run_lm_eval() -> None:
    sys.argv[1:] = with_include_path(sys.argv[1:])

    from lm_eval.__main__ import cli_evaluate

    # Registers `--model depthattn`.
    import_module(".model", __package__)
    cli_evaluate()


def with_include_path(arguments: list[str]) -> list[str]:
    """The arguments with our tasks' folder, where lm-eval takes one.

    Without a command lm-eval itself inserts `run`; a help text needs no folder.
    """
    given = any(argument == _OPTION or argument.startswith(f"{_OPTION}=") for argument in arguments)
    without_folder = not arguments or {"-h", "--help"} & set(arguments)
    if given or without_folder or arguments in ([name] for name in _LM_EVAL_COMMANDS):
        return arguments
    return [*arguments, _OPTION, str(tasks_folder())]
