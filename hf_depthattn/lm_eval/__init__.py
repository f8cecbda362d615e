"""`python -m hf_depthattn.lm_eval ...`: lm-eval's whole command line with our model class and tasks."""
