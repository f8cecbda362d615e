"""What other libraries need to work with our models: Trainer, PEFT and the Auto classes."""
