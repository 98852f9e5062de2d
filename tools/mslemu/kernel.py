"""`metal_kernel`, which is called like `mx.fast.metal_kernel` and runs on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from . import launching, options
from .compiler import compile_kernel
from .errors import KernelError
from .launching import Buffer, Traffic
from .text import KernelSpec, Parameter, Template, generated_text, mlx_text, signature
from .types import HOST_TYPE, MAX_THREADS


class MetalKernel:
    """A kernel that can be called with the arguments of MLX's kernel object.

    Attributes:
        spec: the source and the names.
        last: the traffic of the last launch, even if it broke a rule; None before the first.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.last: Traffic | None = None

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run the kernel and return its outputs.

        Threadgroups are clipped to the grid on each axis; the last one along an axis has only the remaining threads
        (dispatchThreads, in MLX's mlx/backend/metal/custom_kernel.cpp). Unless `init_value` is given, all bits of the
        outputs are initially 1 (NaN, -1).

        Raises:
            KernelError: if the kernel does not compile or breaks a rule of Metal.
            ValueError: for what MLX refuses: wrong counts, more than 1024 threads in a threadgroup.
        """
        arrays = [value if isinstance(value, mx.array) else mx.array(value) for value in inputs]
        _check_count("inputs", arrays, self.spec.input_names)
        _check_count("output_shapes", output_shapes, self.spec.output_names)
        _check_count("output_dtypes", output_dtypes, self.spec.output_names)
        group = [min(threads, extent) for threads, extent in zip(threadgroup, grid)]
        if np.prod(group) > MAX_THREADS:
            raise ValueError(f"Thread group size ({np.prod(group)}) is greater than {MAX_THREADS}")
        if verbose:
            print(generated_text(self.spec, arrays, output_dtypes, template))

        chosen = options.current()
        front = signature(self.spec, arrays, output_dtypes, template or ())
        library = launching.load(compile_kernel(self.spec, front, template or (), chosen))
        by_name = dict(zip(self.spec.input_names, arrays))
        outputs = {
            name: _output_buffer(name, shape, dtype, init_value)
            for name, shape, dtype in zip(self.spec.output_names, output_shapes, output_dtypes)
        }
        buffers = [
            outputs[parameter.name] if parameter.role == "output" else _input_buffer(parameter, by_name)
            for parameter in front.parameters
        ]
        self.last, fault = launching.launch(self.spec.name, library, buffers, grid, group, chosen)
        if fault:
            raise KernelError(fault)
        return [
            _to_array(buffer, shape, dtype)
            for buffer, shape, dtype in zip(outputs.values(), output_shapes, output_dtypes)
        ]


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: dict[str, str] | None = None,
) -> MetalKernel:
    """Build a kernel from its source; arguments as in `mx.fast.metal_kernel`.

    Raises:
        ValueError: if there is no output.
        NotImplementedError: if inputs need not be row-contiguous.
    """
    if not output_names:
        raise ValueError("[metal_kernel] Must specify at least one output.")
    if not ensure_row_contiguous:
        raise NotImplementedError("emulated kernels take row-contiguous inputs")
    spec = KernelSpec(
        name, tuple(input_names), tuple(output_names), source, header, ensure_row_contiguous, atomic_outputs
    )
    return MetalKernel(spec)


def generated_source(
    kernel: MetalKernel,
    inputs: Sequence[mx.array],
    output_dtypes: Sequence[mx.Dtype],
    template: Template | None = None,
) -> str:
    """The source that is run; it must equal `mlx_generated_source`."""
    return generated_text(kernel.spec, inputs, output_dtypes, template)


def mlx_generated_source(kernel: MetalKernel, inputs: Sequence[mx.array], **call: Any) -> str:
    """The source that MLX itself would compile for this call (MLX >= 0.32, on any machine)."""
    return mlx_text(kernel.spec, inputs, **call)


def _check_count(what: str, given: Sequence[Any], names: Sequence[str]) -> None:
    if len(given) != len(names):
        raise ValueError(
            f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size {len(given)}."
        )


def _host_bytes(array: mx.array) -> np.ndarray:
    """The bytes of an array, row-contiguous."""
    array = mx.contiguous(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array)).reshape(-1).view(np.uint8)


def _row_strides(shape: Sequence[int]) -> np.ndarray:
    strides = np.ones(len(shape), np.int64)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides


def _input_buffer(parameter: Parameter, by_name: dict[str, mx.array]) -> Buffer:
    array = by_name[parameter.name]
    if parameter.role == "input":
        data = _host_bytes(array)
    elif parameter.role == "_shape":
        data = np.array(array.shape, np.int32).view(np.uint8)
    elif parameter.role == "_strides":
        data = _row_strides(array.shape).view(np.uint8)
    else:
        data = np.array([array.ndim], np.int32).view(np.uint8)
    buffer = Buffer(parameter.label, data.nbytes, writable=False, initialised=True)
    buffer.bytes[:] = data
    return buffer


def _output_buffer(name: str, shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> Buffer:
    host = np.dtype(HOST_TYPE[dtype])
    size = int(np.prod(shape, dtype=np.int64)) * host.itemsize
    buffer = Buffer(name, size, writable=True, initialised=init_value is not None)
    if init_value is None:
        buffer.bytes[:] = 0xFF
    else:
        buffer.bytes.view(host)[:] = _host_bytes(mx.full((1,), init_value, dtype=dtype)).view(host)[0]
    return buffer


def _to_array(buffer: Buffer, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    array = mx.array(buffer.bytes.view(HOST_TYPE[dtype]).reshape(tuple(shape)).copy())
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
