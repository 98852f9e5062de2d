"""The example kernels under kernels/: written for the emulator's tests, and used for nothing else."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mtp_mlx.metal_kernels.launch import BODY_MARK, HEADER_MARK, KernelText, Launch, TemplateValue

FOLDER = Path(__file__).parent / "kernels"


def read(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> KernelText:
    """The text of one example."""
    head, body = (FOLDER / f"{name}.metal").read_text(encoding="utf-8").split(BODY_MARK, 1)
    header = head.split(HEADER_MARK, 1)[1] if HEADER_MARK in head else ""
    return KernelText(name, inputs, outputs, header, body)


def argmax_rows(logits: mx.array, threads: int = 1024) -> Launch:
    """The index of each row's largest value."""
    rows, vocabulary = logits.shape
    return Launch(
        text=read("argmax_rows", ("logits",), ("out",)),
        inputs=(logits,),
        template=(("T", logits.dtype), ("V", vocabulary)),
        grid=(rows * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=((rows,),),
        output_dtypes=(mx.uint32,),
    )


def reject_sample(
    target: mx.array, draft: mx.array, token: mx.array, uniforms: mx.array, threads: int = 1024
) -> Launch:
    """Speculative sampling of each row: whether the drafted token is kept, and the next token."""
    rows, vocabulary = target.shape
    return Launch(
        text=read("reject_sample", ("target", "draft", "token", "u"), ("accept", "next")),
        inputs=(target, draft, token, uniforms),
        template=(("T", target.dtype), ("V", vocabulary)),
        grid=(rows * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=((rows,), (rows,)),
        output_dtypes=(mx.uint32, mx.uint32),
    )


def qmm4_small(x: mx.array, w: mx.array, scales: mx.array, biases: mx.array) -> Launch:
    """x @ dequantize(w).T, 4 bits in groups of 64."""
    rows, depth = x.shape
    columns = w.shape[0]
    template: tuple[tuple[str, TemplateValue], ...] = (
        ("T", x.dtype),
        ("M", rows),
        ("K", depth),
        ("N", columns),
    )
    return Launch(
        text=read("qmm4_small", ("x", "w", "scales", "biases"), ("y",)),
        inputs=(x, w, scales, biases),
        template=template,
        grid=(32, -(-columns // 8) * 2, 1),
        threadgroup=(32, 2, 1),
        output_shapes=((rows, columns),),
        output_dtypes=(x.dtype,),
    )


def small_kernel(
    body: str,
    data: mx.array,
    *,
    threads: int | None = None,
    threadgroup: int = 32,
    output: mx.Dtype = mx.float32,
    shape: tuple[int, ...] | None = None,
    template: tuple[tuple[str, TemplateValue], ...] = (),
    header: str = "",
    name: str = "small",
    atomic: bool = False,
    init_value: float | None = None,
) -> Launch:
    """One input `a`, one output `o`, one thread per element of `a` unless told; the body knows its thread as `i`."""
    count = threads or data.size
    return Launch(
        text=KernelText(
            name,
            ("a",),
            ("o",),
            header,
            "uint i = thread_position_in_grid.x;\n" + body,
            atomic_outputs=atomic,
        ),
        inputs=(data,),
        template=template,
        grid=(count, 1, 1),
        threadgroup=(threadgroup, 1, 1),
        output_shapes=(shape or (count,),),
        output_dtypes=(output,),
        init_value=init_value,
    )
