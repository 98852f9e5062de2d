"""The same kernel source on NVIDIA: the arguments for mx.fast.cuda_kernel, and a compile check.

msl_cuda.h defines Metal's names and is placed in front of the author's header. Source: MLX's
mlx/backend/cuda/custom_kernel.cpp, for the code around a body, which differs from Metal's: no attributes, template
arguments are local names, every function of the header is a device function.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from .errors import KernelError
from .prepare import prepare
from .text import TemplateValue

HERE = Path(__file__).parent
NAMESPACE = "mlx::core::cu"

CUDA_TYPE: dict[mx.Dtype, str] = {
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
    mx.complex64: f"{NAMESPACE}::complex64_t",
}


class TextLike(Protocol):
    """The part of metal_kernels.launch.KernelText used here."""

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def header(self) -> str: ...
    @property
    def body(self) -> str: ...


class LaunchLike(Protocol):
    """The part of metal_kernels.launch.Launch used here."""

    @property
    def text(self) -> TextLike: ...
    @property
    def inputs(self) -> tuple[mx.array, ...]: ...
    @property
    def template(self) -> tuple[tuple[str, TemplateValue], ...]: ...
    @property
    def output_dtypes(self) -> tuple[mx.Dtype, ...]: ...


def _as_cuda(text: str) -> str:
    """Adapt the source to CUDA; `device` cannot be a macro, because CUDA's own __device__ expands to that word."""
    text = re.sub(r"\bdevice\b", "", prepare(text))
    return text.replace("#pragma clang loop unroll(full)", "#pragma unroll")


def _prelude() -> str:
    return (HERE / "msl_cuda.h").read_text(encoding="utf-8")


def cuda_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
) -> Any:
    """An `mx.fast.cuda_kernel` from Metal source, with the arguments of `mx.fast.metal_kernel`.

    CUDA has no atomic type, so `atomic_outputs` has no effect.
    """
    return mx.fast.cuda_kernel(
        name=name,
        input_names=list(input_names),
        output_names=list(output_names),
        source=_as_cuda(source),
        header=f"namespace {NAMESPACE} {{\n{_prelude()}\n{_as_cuda(header)}\n}}  // namespace {NAMESPACE}\n",
        ensure_row_contiguous=ensure_row_contiguous,
    )


def _template_line(name: str, value: TemplateValue) -> str:
    if isinstance(value, mx.Dtype):
        return f"  using {name} = {CUDA_TYPE[value]};\n"
    if isinstance(value, bool):
        return f"  constexpr bool {name} = {str(value).lower()};\n"
    return f"  constexpr int {name} = {value};\n"


def _parameters(launch: LaunchLike) -> list[str]:
    lines = []
    for name, array in zip(launch.text.inputs, launch.inputs):
        lines.append(f"    const {CUDA_TYPE[array.dtype]}* {name}")
        for role, kind in (("_shape", "Shape"), ("_strides", "Strides"), ("_ndim", "int")):
            if array.ndim > 0 and name + role in launch.text.body:
                lines.append(f"    const __grid_constant__ {kind} {name}{role}")
    lines += [
        f"    {CUDA_TYPE[dtype]}* {name}" for name, dtype in zip(launch.text.outputs, launch.output_dtypes)
    ]
    return lines


def _specialisation(launch: LaunchLike, space: str) -> str:
    """One kernel with its header, as MLX generates it, in a namespace of its own."""
    parameters = ",\n".join(_parameters(launch))
    template = "".join(_template_line(*argument) for argument in launch.template)
    return (
        f"namespace {space} {{\n{_as_cuda(launch.text.header)}\n"
        f"__global__ void custom_kernel_{launch.text.name}(\n{parameters}) {{\n"
        f'{template}\n#line 1 "{launch.text.name}.metal"\n{_as_cuda(launch.text.body)}\n}}\n'
        f"}}  // namespace {space}\n"
    )


def cuda_text(launches: Sequence[LaunchLike]) -> str:
    """The source of one file with the kernels of all launches."""
    kernels = "\n".join(_specialisation(launch, f"launch_{number}") for number, launch in enumerate(launches))
    return (
        '#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
        f"namespace {NAMESPACE} {{\nnamespace cg = cooperative_groups;\n{_prelude()}\n{kernels}\n"
        f"}}  // namespace {NAMESPACE}\n"
    )


def find_nvcc() -> str | None:
    """The path of nvcc: from MSLEMU_NVCC, on PATH, or in CUDA's usual place."""
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    found = os.environ.get("MSLEMU_NVCC") or shutil.which("nvcc")
    return found or (str(usual) if usual.exists() else None)


def compile_check(launches: Sequence[LaunchLike], architecture: str = "sm_80") -> str:
    """Compile the kernels of all launches to machine code, without running them.

    They all go into one file, because reading CUDA's headers takes longer than compiling a kernel.

    Returns:
        What ptxas reports on registers and shared memory.

    Raises:
        KernelError: if there is no nvcc, or it reports errors.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise KernelError("no nvcc: put it on PATH or name it in MSLEMU_NVCC")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "kernels.cu")
        source.write_text(cuda_text(launches), encoding="utf-8")
        flags = ["-cubin", f"-arch={architecture}", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
        # no kernel uses the whole prelude; Metal's own pragmas are unknown here
        flags += ["--diag-suppress", "177,1675,161,20012"]
        command = [
            nvcc,
            *flags,
            "-I",
            str(HERE / "shim_cuda"),
            str(source),
            "-o",
            str(Path(scratch, "kernels.cubin")),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        names = ", ".join(sorted({launch.text.name for launch in launches}))
        raise KernelError(f"{names}: CUDA compile failed\n{(done.stderr + done.stdout)[-4000:]}")
    return done.stderr + done.stdout
