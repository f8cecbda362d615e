"""Formats of other projects' checkpoints that can be imported, one file per format."""
