"""What a forward pass is: blocks of rows, the wrappers on an mlx-lm model, slots, heads and caches.

May import mlx and mlx-lm; must not import from `decode`, `train`, `bench` or `cli`.
"""
