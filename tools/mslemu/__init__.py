"""Runs the unchanged source of an `mx.fast.metal_kernel` on a CPU, under Metal's rules. See tools/README.md."""

from .errors import KernelError
from .kernel import MetalKernel, generated_source, metal_kernel, mlx_generated_source
from .options import Options, options

__all__ = [
    "KernelError",
    "MetalKernel",
    "Options",
    "generated_source",
    "metal_kernel",
    "mlx_generated_source",
    "options",
]
