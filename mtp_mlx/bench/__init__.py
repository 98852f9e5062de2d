"""Side-by-side measurement against mlx-lm's own plain generation. May import everything but `cli` and `serve`."""
