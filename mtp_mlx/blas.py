"""A fast BLAS for the MLX CPU wheel on Linux, which bundles the reference BLAS (tens of times slower).

`libmlx.so` finds `cblas_sgemm` and its like through the dynamic linker, which asks the process's global
libraries first. Loading OpenBLAS with RTLD_GLOBAL *before* mlx puts it in front; LD_PRELOAD does the same.
"""

from __future__ import annotations

import ctypes
import sys

LIBRARY = "libopenblas.so.0"
HOW_TO_MEND = (
    "mtp-mlx: OpenBLAS was not found, so MLX on this CPU is many times slower than it could be: install it "
    "(Debian and Ubuntu: apt-get install libopenblas0-pthread)."
)


def prefer_openblas() -> str | None:
    """Put OpenBLAS in front of the BLAS that MLX brings; call it before mlx is first imported.

    Returns "loaded" when this call did it, "missing" when the library is not installed, "late" when mlx was
    imported already (nothing is done then), and None where it is not wanted: on any system but Linux.
    """
    if not sys.platform.startswith("linux"):
        return None
    if "mlx.core" in sys.modules:
        return "late"
    try:
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return "missing"
    return "loaded"
