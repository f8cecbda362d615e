"""Compare a retrofitted checkpoint with its source."""
