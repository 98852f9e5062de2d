"""Proves that OpenBLAS works with another number of threads for one block only, and that it need not be there."""

from __future__ import annotations

import ctypes
import sys

import pytest

from mtp_mlx.blas import LIBRARY, blas_threads


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="OpenBLAS is used on Linux only")
def test_blas_threads_are_put_back() -> None:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        pytest.skip("OpenBLAS is not installed")
    before = library.openblas_get_num_threads()
    library.openblas_set_num_threads(2)
    try:
        with pytest.raises(KeyError), blas_threads(1):
            assert library.openblas_get_num_threads() == 1
            raise KeyError
        assert library.openblas_get_num_threads() == 2
    finally:
        library.openblas_set_num_threads(before)


def test_blas_threads_without_openblas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block runs all the same, and its errors come out."""
    monkeypatch.setattr("mtp_mlx.blas.LIBRARY", "libnone.so.0")
    ran = 0
    with blas_threads(1):
        ran += 1
    assert ran == 1
    with pytest.raises(KeyError), blas_threads(1):
        raise KeyError
