"""A smaller model of the same vocabulary drafts: what mlx-lm's users know as `--draft-model`."""
