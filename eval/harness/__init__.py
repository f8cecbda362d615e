"""Tasks of lm-eval: suites, the model class, resumable runs, tables and comparisons."""
