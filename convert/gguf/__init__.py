"""Converts GGUF files to mlx-lm model folders."""
