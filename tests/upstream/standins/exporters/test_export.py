"""Stands in for tests of transformers that its source distribution lacks."""


class ExportTesterMixin:
    """Nothing to test."""


class ExportGenerateTesterMixin:
    """Nothing to test."""
