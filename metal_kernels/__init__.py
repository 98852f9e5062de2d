"""Metal kernels for verification: one `.metal` file, one wrapper with a pure-MLX reference, one test each.

Which of them run is the dispatcher's business; importing this package needs no GPU.
"""
