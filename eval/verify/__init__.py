"""Compares a retrofitted checkpoint with its source."""
