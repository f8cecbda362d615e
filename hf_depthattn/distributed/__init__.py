"""Models on several devices: pipeline stages and what they exchange, their checkpoints, and plans for many GPUs."""
