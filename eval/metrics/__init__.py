"""Depth metrics: how layers, sublayers, sources and slots contribute to the predictions of a causal language model."""
