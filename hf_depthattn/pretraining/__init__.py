"""Training from scratch: configs of new models, tokenizers, packed text and run folders (examples/pretrain.py)."""
