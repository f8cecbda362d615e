"""Check checkpoints and load models from them, with an error if a tensor is missing or not part of the model."""
