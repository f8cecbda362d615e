"""Ops that models do not use yet; they are not copied into checkpoints."""
