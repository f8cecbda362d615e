"""Depth metrics: what each layer, sublayer, source and slot does for the predictions of a causal language model."""
