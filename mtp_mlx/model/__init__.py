"""Forward passes: blocks of rows, the wrappers on an mlx-lm model, the LM head and the caches.

May import mlx, mlx-lm and `metal_kernels`, but none of the rooms above: `decode`, `planning`, `train`, `drafters`,
...
"""
