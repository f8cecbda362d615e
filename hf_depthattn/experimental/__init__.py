"""Ops that no model uses yet; no checkpoint carries them."""
