"""GGUF files to mlx-lm folders."""
