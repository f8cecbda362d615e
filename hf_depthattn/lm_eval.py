"""`python -m hf_depthattn.lm_eval ...`: lm-eval's whole command line with our model class and tasks.

The module has the name of the library that it starts. It imports nothing of that library itself, and files of this
package import each other by their full names, so neither can stand in for the other.
"""

from importlib import import_module


def main() -> None:
    """Run lm-eval's command with the arguments of the process."""
    # By name, as the package does for `retrofit`: `eval` lies above this folder.
    import_module(f"{__package__}.eval.harness.cli").main()


if __name__ == "__main__":
    main()
