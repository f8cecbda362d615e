"""lm-eval integration: model class, tasks, suites, resumable runs, result tables and comparisons."""
