"""Metal kernels for drafting and verification: for each, a `.metal` file, a wrapper with a reference, and a test.

The dispatcher decides which kernels run. Importing this package needs no GPU.
"""
