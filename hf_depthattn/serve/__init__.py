"""`python -m hf_depthattn.serve ...`: `transformers serve` for models with depth attention."""
