"""Metal kernels, each with its wrapper and array-op reference. They come with the kernel work; the runtime is
pure MLX."""
