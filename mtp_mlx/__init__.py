"""Dense mlx-lm models write several tokens per forward pass, with the same text."""
