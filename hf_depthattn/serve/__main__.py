"""`python -m hf_depthattn.serve ...`: `transformers serve` for models with depth attention.

`transformers serve` looks up the class of a model by its name in the module `transformers`, also for remote code.
"""

from __future__ import annotations

import sys

from ..cli.run_command import EXIT_OK, run_command
from ..errors import UserError

#: Named in the `architectures` of checkpoints that generate text.
_SERVED_CLASS = "DepthAttnForCausalLM"


def run() -> int:
    """Run `transformers serve` with `sys.argv` until it is stopped; stock models can be served as well.

    Returns:
        The exit code.

    Raises:
        UserError: if a package that the server needs is not installed.
    """
    import transformers
    import typer
    from transformers.cli.serve import Serve
    from transformers.utils.import_utils import is_serve_available

    import hf_depthattn

    if not is_serve_available():
        raise UserError("fastapi, openai, pydantic or uvicorn is not installed; pip install 'hf-depthattn[serve]'.")
    setattr(transformers, _SERVED_CLASS, getattr(hf_depthattn, _SERVED_CLASS))
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(Serve)
    app(prog_name="python -m hf_depthattn.serve", standalone_mode=False)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_command(run, "hf_depthattn.serve"))
