"""lm-eval's command line with this package's model class and tasks.

lm-eval looks for neither plugins nor entry points (0.4.13), so a process has to import a model class before it starts
the command.
"""

from __future__ import annotations

import sys

from ...conversion.checkpoint_files import ConversionError
from .evaluation import need_lm_eval, prepare_environment
from .suites import TASKS_FOLDER

_INCLUDE = "--include_path"
_COMMANDS = ("run", "ls", "validate")


def main() -> None:
    """Run lm-eval with `sys.argv`; `--include_path` is our tasks' folder unless another one is given."""
    prepare_environment()
    try:
        need_lm_eval()
        _run()
    except ConversionError as error:
        print(f"hf_depthattn.lm_eval: error: {error}", file=sys.stderr)
        sys.exit(2)


def _run() -> None:
    sys.argv[1:] = with_include_path(sys.argv[1:])

    from lm_eval.__main__ import cli_evaluate

    # Registers `--model depthattn`.
    import hf_depthattn.eval.harness.model  # noqa: F401

    cli_evaluate()


def with_include_path(arguments: list[str]) -> list[str]:
    """The arguments with our tasks' folder, where lm-eval takes one.

    Without a command lm-eval itself inserts `run`; a help text needs no folder.
    """
    given = any(argument == _INCLUDE or argument.startswith(f"{_INCLUDE}=") for argument in arguments)
    if given or not arguments or {"-h", "--help"} & set(arguments) or arguments in ([name] for name in _COMMANDS):
        return arguments
    return [*arguments, _INCLUDE, str(TASKS_FOLDER)]
