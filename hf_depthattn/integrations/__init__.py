"""Integrations with Trainer, PEFT and the Auto classes."""
