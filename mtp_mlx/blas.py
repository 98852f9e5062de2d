"""A fast BLAS for MLX's CPU wheel on Linux, which bundles the reference BLAS (tens of times slower).

`libmlx.so` finds `cblas_sgemm` and the like through the dynamic linker, which searches the process's global libraries
first. Loading OpenBLAS with RTLD_GLOBAL *before* mlx puts it in front, as LD_PRELOAD does.
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
    """Puts OpenBLAS in front of the BLAS that MLX bundles; call it before mlx is first imported.

    Returns:
        "loaded" if it was loaded, "missing" if the library is not installed, "late" if mlx is already imported (then
        nothing is done), and None on systems other than Linux, which do not need it.
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
    """Temporarily sets OpenBLAS's number of threads to `count`.

    For callers that run several threads themselves, for which one BLAS thread each is faster. The setting applies to
    the whole process; without OpenBLAS, nothing happens.
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
    """The OpenBLAS that this process has already loaded, or None; never loads it."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(LIBRARY, mode=os.RTLD_NOLOAD)
    except OSError:
        return None
    return library if hasattr(library, "openblas_set_num_threads") else None
