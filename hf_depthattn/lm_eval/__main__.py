"""`python -m hf_depthattn.lm_eval ...`: the command line of lm-eval with our model class and tasks."""

from ..eval.harness.cli import main

if __name__ == "__main__":
    main()
