"""The code that MLX generates around a kernel's body: as generated here, and as MLX itself prints it.

Source: write_signature and its caller in MLX's mlx/backend/common/metal_kernel.cpp (0.32). Attributes, shapes and
strides become parameters if their name occurs anywhere in the body, as a substring; the header is not searched.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .types import ATTRIBUTES, METAL_TYPE, SMALL_INPUT, Attribute

TemplateValue = int | bool | mx.Dtype
Template = Sequence[tuple[str, TemplateValue]]


@dataclass(frozen=True)
class KernelSpec:
    """The arguments of `mx.fast.metal_kernel`."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False


@dataclass(frozen=True)
class Parameter:
    """One buffer of the kernel.

    Attributes:
        name: name of its input or output.
        role: "input", "output", or a property of an input: "_shape", "_strides" or "_ndim".
        space, type: as in `space type* name`.
        reference: whether it is declared with `&` instead of `*`.
    """

    name: str
    role: str
    space: str
    type: str
    reference: bool = False

    @property
    def label(self) -> str:
        """The parameter's name in the kernel."""
        return self.name if self.role in ("input", "output") else self.name + self.role

    def declaration(self, index: int) -> str:
        """The parameter in the signature."""
        return f"  {self.space} {self.type}{'&' if self.reference else '*'} {self.label} [[buffer({index})]]"


@dataclass(frozen=True)
class Signature:
    """The code in front of the body, and the arguments it needs."""

    name: str
    text: str
    parameters: tuple[Parameter, ...]
    attributes: tuple[Attribute, ...]


def template_arguments(template: Template) -> str:
    """`<bfloat16_t, 4, 1>`: bools are instantiated as 0 and 1."""
    values = [METAL_TYPE[v] if isinstance(v, mx.Dtype) else str(int(v)) for _, v in template]
    return "<" + ", ".join(values) + ">"


def kernel_name(
    spec: KernelSpec, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype], template: Template
) -> str:
    """The name of one specialisation.

    An input is marked `s` if it has no dimensions and `c` if it is small, because both change the signature.
    """
    name = "custom_kernel_" + spec.name
    if template:
        arguments = template_arguments(template).replace(", ", "_").translate(str.maketrans("<>-", "___"))
        name += "_" + arguments[:-1]
    for array in inputs:
        mark = "s" if array.ndim == 0 else "c" if array.size < SMALL_INPUT else ""
        name += f"_{METAL_TYPE[array.dtype]}{mark}"
    return name + "".join("_" + METAL_TYPE[dtype] for dtype in output_dtypes)


def _parameters(
    spec: KernelSpec, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype]
) -> list[Parameter]:
    found = []
    for name, array in zip(spec.input_names, inputs):
        space = "const constant" if array.size < SMALL_INPUT else "const device"
        found.append(Parameter(name, "input", space, METAL_TYPE[array.dtype], reference=array.ndim == 0))
        if array.ndim > 0:
            for role, kind in (("_shape", "int"), ("_strides", "int64_t"), ("_ndim", "int")):
                if name + role in spec.source:
                    found.append(Parameter(name, role, "const constant", kind, reference=role == "_ndim"))
    for name, dtype in zip(spec.output_names, output_dtypes):
        kind = f"atomic<{METAL_TYPE[dtype]}>" if spec.atomic_outputs else METAL_TYPE[dtype]
        found.append(Parameter(name, "output", "device", kind))
    return found


def _template_kind(value: TemplateValue) -> str:
    return "typename" if isinstance(value, mx.Dtype) else "bool" if isinstance(value, bool) else "int"


def signature(
    spec: KernelSpec, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype], template: Template
) -> Signature:
    """The code between header and body."""
    name = kernel_name(spec, inputs, output_dtypes, template)
    parameters = _parameters(spec, inputs, output_dtypes)
    attributes = [attribute for attribute in ATTRIBUTES if attribute.name in spec.source]
    lines = [parameter.declaration(index) for index, parameter in enumerate(parameters)]
    lines += [f"  {attribute.type} {attribute.name} [[{attribute.name}]]" for attribute in attributes]
    text = ""
    if template:
        text = "template <" + ", ".join(f"{_template_kind(value)} {key}" for key, value in template) + ">\n"
    text += f"[[kernel]] void {name}(\n" + ",\n".join(lines) + ") {\n"
    return Signature(name, text, tuple(parameters), tuple(attributes))


def generated_text(
    spec: KernelSpec,
    inputs: Sequence[mx.array],
    output_dtypes: Sequence[mx.Dtype],
    template: Template | None = None,
) -> str:
    """The whole source that MLX compiles after its own utilities; it must equal `mlx_text`."""
    front = signature(spec, inputs, output_dtypes, template or ())
    text = spec.header + front.text + spec.source + "\n}\n"
    if template:
        instance = front.name + template_arguments(template)
        text += f'\ntemplate [[host_name("{front.name}")]] [[kernel]] decltype({instance}) {instance};\n'
    return text


def mlx_text(spec: KernelSpec, inputs: Sequence[mx.array], **call: Any) -> str:
    """The source that MLX itself generates for a call, on any machine.

    A call needs a GPU, but exporting a function only records it (MLX >= 0.32), and `verbose` then prints the source.
    It is not printed by Python, so the file descriptor of standard output is redirected meanwhile.
    """
    kernel: Any = mx.fast.metal_kernel(
        name=spec.name,
        input_names=list(spec.input_names),
        output_names=list(spec.output_names),
        source=spec.source,
        header=spec.header,
        ensure_row_contiguous=spec.ensure_row_contiguous,
        atomic_outputs=spec.atomic_outputs,
    )
    sys.stdout.flush()
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryDirectory() as folder:
        saved = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            path = str(Path(folder, "recorded.mlxfn"))
            mx.export_function(
                path, lambda *arrays: kernel(inputs=list(arrays), verbose=True, **call), *inputs
            )
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        printed.seek(0)
        text = printed.read().decode()
    return text.split("```\n", 1)[1].rsplit("\n```", 1)[0]
