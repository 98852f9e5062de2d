"""Finding clang, and the cache: one clear sentence without a compiler, no collisions, shared between processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mslemu
import pytest
from mslemu import compiler

from tests.metal_kernels import emulated
from tests.tools.examples import small_kernel

TOOLS = Path(mslemu.__file__).parents[1]
DATA = mx.arange(64).astype(mx.float32)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MSLEMU_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


# ---------------------------------------------------------------------------------------------- the compiler


def test_without_clang_one_sentence_says_what_to_do(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("MSLEMU_CXX", raising=False)
    monkeypatch.setattr(compiler.sys, "executable", "/nowhere/python")  # no ziglang either
    compiler._find_clang.cache_clear()
    try:
        with pytest.raises(mslemu.KernelError) as caught:
            emulated.run(small_kernel("o[i] = a[i];", DATA))
    finally:
        compiler._find_clang.cache_clear()
    assert str(caught.value) == (
        "the emulator needs clang++ >= 17: install it (apt-get install clang-19, or pip install ziglang) "
        "or name it in MSLEMU_CXX"
    )


def test_a_named_compiler_must_be_a_new_clang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSLEMU_CXX", "/bin/true")
    with pytest.raises(mslemu.KernelError, match="MSLEMU_CXX=/bin/true is not clang"):
        compiler.find_clang()


def test_other_systems_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.sys, "platform", "darwin")
    with pytest.raises(mslemu.KernelError, match="^the emulator runs on Linux, not on darwin$"):
        emulated.run(small_kernel("o[i] = a[i];", DATA))


# ---------------------------------------------------------------------------------------------- the cache


def test_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSLEMU_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "mslemu"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # cannot be made
    monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / f"mslemu-{os.getuid()}"


def test_two_texts_of_one_name_do_not_collide(empty_cache: Path) -> None:
    plus = small_kernel(
        "o[i] = a[i] + shift();", DATA, header="inline float shift() { return 1.0; }\n", name="twin"
    )
    minus = small_kernel(
        "o[i] = a[i] + shift();", DATA, header="inline float shift() { return -1.0; }\n", name="twin"
    )
    for _ in range(2):  # compiled, then from memory
        assert mx.array_equal(emulated.run(plus)[0], DATA + 1)
        assert mx.array_equal(emulated.run(minus)[0], DATA - 1)
    assert len(list(empty_cache.glob("twin-*.so"))) == 2
    emulated.run(plus, mode="fast")
    assert len(list(empty_cache.glob("twin-*.so"))) == 3


def test_a_kernel_is_compiled_once_and_nothing_else_is_left(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = small_kernel("o[i] = a[i] * 3;", DATA, name="once")
    emulated.run(launch)
    left = {path.name.split("-")[0] for path in empty_cache.iterdir()}
    assert left - {"runtime"} == {"once", "mlx"}  # the runtime is of the first launch of this process
    monkeypatch.setattr(compiler, "_run", lambda *_: pytest.fail("compiled again"))
    emulated.run(launch)


def test_a_refused_text_leaves_nothing(empty_cache: Path) -> None:
    with pytest.raises(mslemu.KernelError, match="failed"):
        emulated.run(small_kernel("o[i] = undeclared;", DATA, name="refused"))
    assert not [path for path in empty_cache.iterdir() if not path.name.startswith("mlx-")]


CHILD = """
import mlx.core as mx, mslemu
kernel = mslemu.metal_kernel("shared", ["a"], ["o"], "o[thread_position_in_grid.x] = a[0] + 2;")
launch = dict(grid=(8, 1, 1), threadgroup=(8, 1, 1), output_shapes=[(8,)], output_dtypes=[mx.float32])
assert kernel(inputs=[mx.ones((8,))], **launch)[0].tolist() == [3.0] * 8
"""


def test_processes_share_a_cache(empty_cache: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TOOLS)}
    children = [subprocess.Popen([sys.executable, "-c", CHILD], env=environment) for _ in range(3)]
    assert [child.wait(timeout=300) for child in children] == [0, 0, 0]
    assert len(list(empty_cache.iterdir())) == 3  # the runtime, MLX's headers, the kernel
