"""A fast BLAS for the MLX CPU wheel on Linux, which bundles the reference BLAS (tens of times slower).

`libmlx.so` finds `cblas_sgemm` and its like through the dynamic linker, which asks the process's global
libraries first. Loading OpenBLAS with RTLD_GLOBAL *before* mlx puts it in front; LD_PRELOAD does the same.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """OpenBLAS works with `count` threads inside the block, and with as many as before after it.

    For callers that run several threads themselves: each of them waiting for OpenBLAS's own threads is slower
    than one thread each. A setting of the whole process; nothing happens where OpenBLAS is not loaded.
    """
    library = _loaded_openblas()
    if library is None:
        yield
        return
    before = library.openblas_get_num_threads()
    library.openblas_set_num_threads(count)
    try:
        yield
    finally:
        library.openblas_set_num_threads(before)


def _loaded_openblas() -> ctypes.CDLL | None:
    """The OpenBLAS this process has loaded already, or None; never loads it."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(LIBRARY, mode=os.RTLD_NOLOAD)
    except OSError:
        return None
    return library if hasattr(library, "openblas_set_num_threads") else None
