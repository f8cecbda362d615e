"""`python -m hf_depthattn.serve ...`: `transformers serve` for models with depth attention.

`transformers serve` looks up the class of a model by its name in the module `transformers`, also for remote code.
"""

from __future__ import annotations

import sys

from ..cli.run_command import EXIT_OK, run_command
from ..errors import UserError
from ..utils.paths import user_path

#: Named in the `architectures` of checkpoints that generate text.
_SERVED_CLASS = "DepthAttnForCausalLM"


def run() -> int:
    """Run `transformers serve` with `sys.argv` until it is stopped; stock models can be served as well.

    Returns:
        The exit code.

    Raises:
        UserError: if a package that the server needs is not installed, or the folder of the model does not exist.
    """
    import transformers
    import typer
    from transformers.cli.serve import Serve
    from transformers.utils.import_utils import is_serve_available

    import hf_depthattn

    if not is_serve_available():
        raise UserError("fastapi, openai, pydantic or uvicorn is not installed; pip install 'hf-depthattn[serve]'.")
    _check_folder(sys.argv[1:])
    setattr(transformers, _SERVED_CLASS, getattr(hf_depthattn, _SERVED_CLASS))
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(Serve)
    app(prog_name="python -m hf_depthattn.serve", standalone_mode=False)
    return EXIT_OK


def _check_folder(arguments: list[str]) -> None:
    """Check that the model exists if it is a path; transformers would take it for an invalid Hub id."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        # What follows an option may be its value, and a colon comes before the name of a GGUF file.
        is_path = word.startswith(("/", "./", "../", "~")) and not before.startswith("-") and ":" not in word
        if is_path and not user_path(word).exists():
            raise UserError(f"{word}: no such folder.")


if __name__ == "__main__":
    sys.exit(run_command(run, "hf_depthattn.serve"))
