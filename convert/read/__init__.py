"""Files of checkpoints: safetensors, PyTorch, lazily and without running code in them."""
