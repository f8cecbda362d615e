"""Instruments of the metrics: observe a model while it reads a text, and change what it computes."""
