"""Utilities for all parts of the package: paths, text tables, progress bars, result files."""
