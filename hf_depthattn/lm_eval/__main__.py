"""`python -m hf_depthattn.lm_eval ...`: the command line of lm-eval with our model class and tasks."""

from __future__ import annotations

import sys

from ..cli.run_command import EXIT_OK, advice_after_interrupt, run_command
from ..eval.harness.cli import main


def run() -> int:
    """Run lm-eval, and return the exit code; what lm-eval exits with itself is not changed."""
    with advice_after_interrupt("what lm-eval has written is kept"):
        main()
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_command(run, "hf_depthattn.lm_eval"))
