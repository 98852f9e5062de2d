"""Reads checkpoint files (safetensors and PyTorch) lazily, without running any code in them."""
