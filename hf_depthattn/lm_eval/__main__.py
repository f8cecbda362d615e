"""`python -m hf_depthattn.lm_eval ...`: lm-eval's whole command line with our model class and tasks."""

from ..eval.harness.cli import main

if __name__ == "__main__":
    main()
