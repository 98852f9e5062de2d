"""Drafting with a smaller model that has the same vocabulary, like mlx-lm's `--draft-model`."""
