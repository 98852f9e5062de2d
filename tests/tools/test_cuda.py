"""Every kernel's text also compiles for NVIDIA GPUs; the examples compute the same on one where there is one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mslemu import KernelError, cuda

from mtp_mlx.metal_kernels.launch import KernelText, Launch
from tests.metal_kernels import emulated
from tests.tools import examples

RNG = np.random.default_rng(4)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

needs_nvcc = pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc here")
needs_gpu = pytest.mark.skipif(not mx.cuda.is_available(), reason="no NVIDIA GPU that MLX can use here")


def normal(dtype: mx.Dtype, *shape: int) -> mx.array:
    return mx.array(RNG.normal(size=shape).astype(np.float32)).astype(dtype)


def argmax(dtype: mx.Dtype) -> Launch:
    return examples.argmax_rows(normal(dtype, 3, 1000), threads=96)


def reject(dtype: mx.Dtype) -> Launch:
    tokens, uniforms = mx.array([3, 1, 4], dtype=mx.uint32), mx.array(RNG.random((3, 2)).astype(np.float32))
    return examples.reject_sample(
        normal(dtype, 3, 1000), normal(dtype, 3, 1000), tokens, uniforms, threads=96
    )


def qmm(dtype: mx.Dtype) -> Launch:
    parts = mx.quantize(normal(dtype, 24, 512), group_size=64, bits=4)
    return examples.qmm4_small(normal(dtype, 5, 512), *parts)


def words(dtype: mx.Dtype) -> Launch:
    """The words of Metal that the other examples do without."""
    body = """
      threadgroup uint counts[4];
      if (i < 4) { counts[i] = 0u; }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      vec<T, 4> v = ((const device vec<T, 4>*)a)[i % 8];
      float4 f = float4(float(v.x), float(v.y), float(v[2]), float(v[3])) * 2.0 + float4(1.0);
      uint bits = as_type<uint>(f.x);  // exact on both sides
      f.w = dot(f, f);
      uint mixed = mulhi(bits, 0xD2511F53u) ^ rotate(bits, 13u) ^ popcount(bits);
      float sums = simd_prefix_exclusive_sum(f.x) + quad_sum(f.y) + simd_shuffle_xor(f.z, 5) + simd_max(f.w);
      float other = log1p(fast::exp(-metal::abs(f.x))) + precise::log(1.0 + f.y * f.y);
      other += select(0.0f, 1.0f, f.x > f.y);
      o[i] = T(clamp(sums + other + float(mixed % 7u) * 1e-3 + float(counts[i % 4]), -50.0f, 50.0f));"""
    return examples.small_kernel(
        body, normal(dtype, 32), template=(("T", dtype),), output=dtype, name="words"
    )


EXAMPLES: dict[str, Callable[[mx.Dtype], Launch]] = {
    "argmax": argmax,
    "reject": reject,
    "qmm": qmm,
    "words": words,
}


@needs_nvcc
def test_examples_compile() -> None:
    """For all dtypes in one call, which is most of the time of each."""
    report = cuda.compile_check([make(dtype) for make in EXAMPLES.values() for dtype in DTYPES])
    assert report.count("Compiling entry function") == len(EXAMPLES) * len(DTYPES)


KERNELS = ("verify_tail", "small_m_qmm", "row_exact", "block_attention", "gated_lora", "lm_head_pick")


class Recorder:
    """A factory whose kernels remember their launches and answer with zeros."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, **spec: Any) -> Callable[..., list[mx.array]]:
        text = KernelText(
            spec["name"],
            tuple(spec["input_names"]),
            tuple(spec["output_names"]),
            spec["header"],
            spec["source"],
            spec["atomic_outputs"],
        )

        def call(**call: Any) -> list[mx.array]:
            frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in call.items()}
            self.launches.append(Launch(text, **frozen))
            return [
                mx.zeros(shape, dtype) for shape, dtype in zip(call["output_shapes"], call["output_dtypes"])
            ]

        return call


def recorded(kernel: str) -> list[Launch]:
    """Every specialisation that the kernel's own samples launch, once."""
    module = importlib.import_module(f"mtp_mlx.metal_kernels.{kernel}")
    recorder = Recorder()
    for arguments in module.samples():
        module.run(recorder, *arguments)
    return list({(launch.text, launch.template): launch for launch in recorder.launches}.values())


@needs_nvcc
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile(kernel: str) -> None:
    launches = recorded(kernel)
    report = cuda.compile_check(launches)
    assert report.count("Compiling entry function") == len(launches)


@needs_gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree_with_their_references_on_a_gpu(kernel: str) -> None:
    """The samples of every kernel, executed by `mx.fast.cuda_kernel`."""
    module = importlib.import_module(f"mtp_mlx.metal_kernels.{kernel}")
    for arguments in module.samples():
        assert module.agrees(module.run(cuda.cuda_kernel, *arguments), module.reference(*arguments))


@needs_nvcc
def test_a_fault_is_reported_with_its_line() -> None:
    launch = emulated.edited(argmax(mx.float32), lambda text: text.replace("simd_max(v)", "simd_most(v)", 1))
    line = launch.text.body[: launch.text.body.index("simd_most")].count("\n") + 1
    with pytest.raises(KernelError, match=rf'argmax_rows\.metal\({line}\): error: identifier "simd_most"'):
        cuda.compile_check([launch])


def test_without_nvcc_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_nvcc", lambda: None)
    with pytest.raises(KernelError, match="^no nvcc: put it on PATH or name it in MSLEMU_NVCC$"):
        cuda.compile_check([argmax(mx.float32)])


def test_words_are_right_under_emulation() -> None:
    """So that a GPU is compared with something that was checked."""
    emulated.run(words(mx.float32))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_compute_the_same_on_a_gpu(example: str, dtype: mx.Dtype) -> None:
    launch = EXAMPLES[example](dtype)
    ours, theirs = launch.run(cuda.cuda_kernel), emulated.run(launch)
    bound = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}[dtype]
    for on_gpu, emulated_here in zip(ours, theirs):
        a, b = (np.array(x.astype(mx.float32)) for x in (on_gpu, emulated_here))
        assert np.allclose(a, b, rtol=bound, atol=bound)
