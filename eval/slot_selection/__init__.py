"""Choose the depth slots that each layer of a model with MoDA reads."""
