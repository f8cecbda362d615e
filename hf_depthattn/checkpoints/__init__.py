"""Reads checkpoints and loads models from them: completely, or not at all."""
