"""What all kernels have in common: their Metal source, and a launch as plain data.

A kernel's module builds its `Launch`. Shapes are checked and the grid is computed only there, so that a Mac, the
emulator and CUDA all make exactly the same call. A *factory* builds a callable kernel from source:
`mx.fast.metal_kernel`, or a substitute with the same signature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

Factory = Callable[..., Any]
TemplateValue = int | bool | mx.Dtype

SMALL_INPUT = 8  # inputs with fewer elements live in `constant` memory, others in `device`
HEADER_MARK, BODY_MARK = "//@header\n", "//@body\n"


class Support(NamedTuple):
    """Whether a kernel supports a call, and if not, why (one clause, shown by `doctor`)."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class KernelText:
    """A kernel's name, buffer names and Metal source.

    `header` is at global scope before the kernel; `body` is what `mx.fast.metal_kernel` calls `source`.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    body: str
    atomic_outputs: bool = False


def read_kernel(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], atomic_outputs: bool = False
) -> KernelText:
    """The source in `<name>.metal` beside this file: comments, then `//@header` and `//@body`."""
    text = Path(__file__).with_name(f"{name}.metal").read_text(encoding="utf-8")
    head, body = text.split(BODY_MARK, 1)
    header = head.split(HEADER_MARK, 1)[1] if HEADER_MARK in head else ""
    return KernelText(name, inputs, outputs, header, body, atomic_outputs)


@cache
def _built(factory: Factory, text: KernelText) -> Any:
    """The kernel object of a source, built once; MLX compiles it once per object and template."""
    return factory(
        name=text.name,
        input_names=list(text.inputs),
        output_names=list(text.outputs),
        source=text.body,
        header=text.header,
        atomic_outputs=text.atomic_outputs,
    )


@dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    Attributes:
        text: the source to run.
        inputs: row-contiguous arrays with at least one dimension, in the order of `text.inputs`.
        template: template arguments by name.
        grid: threads per axis; a multiple of `threadgroup`.
        threadgroup: threads per threadgroup and axis, at most 1024 in all.
        output_shapes, output_dtypes: in the order of `text.outputs`.
        init_value: what every output starts from; None leaves it uninitialised.
    """

    text: KernelText
    inputs: tuple[mx.array, ...]
    template: tuple[tuple[str, TemplateValue], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]
    init_value: float | None = None

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments with which the kernel object is called."""
        return {
            "inputs": list(self.inputs),
            "template": list(self.template),
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "output_shapes": list(self.output_shapes),
            "output_dtypes": list(self.output_dtypes),
            "init_value": self.init_value,
        }

    def kernel(self, factory: Factory) -> Any:
        """The kernel object that `factory` builds from the source, built once."""
        return _built(factory, self.text)

    def run(self, factory: Factory) -> list[mx.array]:
        """Run the kernel and return its outputs."""
        return list(self.kernel(factory)(**self.arguments()))
