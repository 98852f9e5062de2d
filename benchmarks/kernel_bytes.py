"""Bytes moved by every kernel relative to the minimum, counted under emulation: the table of docs/kernels.md.

The minimum is to read every needed input once and to write every output once. The emulator counts the loads of the
threads, so a second load that a GPU's cache would serve still counts. Hence there are two ratios: for the operand
that a launch streams (weights, logits, keys and values, factors), which no cache holds; and in total, where the few
kilobytes that every threadgroup loads again (activations, shapes) count as if they came from memory.

    PYTHONPATH=tools python benchmarks/kernel_bytes.py
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mslemu
from mlx.utils import tree_flatten

from mtp_mlx.metal_kernels import (
    block_attention,
    gated_lora,
    lm_head_pick,
    row_exact,
    small_m_qmm,
    verify_tail,
)
from mtp_mlx.metal_kernels.position_noise import row_keys
from mtp_mlx.model.block import block_shape

# The buffers that each kernel streams.
STREAMED = {
    verify_tail: ("logits",),
    small_m_qmm: ("w", "scales", "biases"),
    row_exact: ("w", "scales", "biases"),
    block_attention: ("keys", "key_scales", "key_biases", "values", "value_scales", "value_biases"),
    gated_lora: ("down", "up"),
    lm_head_pick: ("weight", "scales", "biases"),
}


@dataclass(frozen=True)
class Case:
    """One call of a kernel.

    Attributes:
        module: the kernel's module.
        what: description of the call, for the table.
        arguments: arguments of the call.
        streamed: the arrays that it streams.
        unneeded_streamed, unneeded: bytes of these and of other arrays that need not be read.
    """

    module: Any
    what: str
    arguments: tuple[Any, ...]
    streamed: Any
    unneeded_streamed: int = 0
    unneeded: int = 0


class Counting:
    """A kernel factory that counts the bytes moved by launches."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self.written = self.launches = 0

    def __call__(self, **text: Any) -> Callable[..., Any]:
        kernel = mslemu.metal_kernel(**text)

        def call(**arguments: Any) -> Any:
            outputs = kernel(**arguments)
            self.read.update(kernel.last["read"])
            self.written += sum(kernel.last["written"].values())
            self.launches += 1
            return outputs

        return call


def nbytes(arrays: Any) -> int:
    """The bytes of all arrays in a nested value."""
    return sum(array.nbytes for _, array in tree_flatten([arrays]) if isinstance(array, mx.array))


def measure(case: Case) -> tuple[int, float, float]:
    """(launches, streamed bytes / minimum, all bytes / minimum)."""
    counting = Counting()
    outputs = case.module.run(counting, *case.arguments)
    names = STREAMED[case.module]
    streamed = sum(counting.read[name] for name in names)
    least_streamed = nbytes(case.streamed) - case.unneeded_streamed
    least = nbytes(list(case.arguments)) + nbytes(outputs) - case.unneeded_streamed - case.unneeded
    moved = sum(counting.read.values()) + counting.written
    return counting.launches, streamed / least_streamed, moved / least


def quantised(rows: int, columns: int, size: int, bits: int) -> tuple[Any, ...]:
    """The arguments of a quantised product in bfloat16, with groups of 64."""
    weight = mx.random.normal((columns, size)).astype(mx.bfloat16)
    packed = mx.quantize(weight, group_size=64, bits=bits)
    return (mx.random.normal((rows, size)).astype(mx.bfloat16), *packed, 64, bits)


TREE = (*range(-1, 7), -1, *range(8, 14))  # drafts in two chains behind the pending token


def attention(
    heads: int,
    key_heads: int,
    size: int,
    rows: int,
    length: int,
    bits: int | None = None,
    tree: tuple[int, ...] = (),
) -> Case:
    """A block after a long prefix, float16; a quarter of the cache's buffer is unused."""
    capacity = length + length // 4 // 32 * 32
    queries = mx.random.normal((heads, rows, size)).astype(mx.float16)
    caches: list[Any] = [mx.random.normal((key_heads, capacity, size)).astype(mx.float16) for _ in range(2)]
    if bits:
        caches = [mx.quantize(cache, group_size=64, bits=bits) for cache in caches]
    visible = block_shape(rows - 1, (0,) * rows, 0, tree).visibility
    words = block_attention.visibility_words(mx.array(visible))
    held = sum(array.nbytes for _, array in tree_flatten(caches))
    what = f"{heads}/{key_heads} heads of {size}, {rows} rows, {length} keys" + (", 8-bit" if bits else "")
    what += ", tree" if tree else ""
    arguments = (queries, *caches, words, length, size**-0.5)
    return Case(block_attention, what, arguments, caches, held - held * length // capacity)


def lora(inputs: int, outputs: int, rank: int, real: int, slots: int) -> Case:
    """Slot rows after real rows, float16."""

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape).astype(mx.float16)

    x, y = normal(real + slots, inputs), normal(real + slots, outputs)
    factors = (normal(inputs, rank), normal(rank, outputs))
    what = f"{inputs} x {outputs}, rank {rank}, {slots} slot rows behind {real} real ones"
    return Case(
        gated_lora, what, (x, y, *factors, real, 2.0), factors, unneeded=real * (inputs + outputs) * 2
    )


def tail(rows: int, columns: int, temperature: float, parents: tuple[int, ...] = ()) -> Case:
    """The picks of a block's real rows, bfloat16 logits."""
    logits = mx.random.normal((rows, columns)).astype(mx.bfloat16)
    noise = row_keys(1, mx.arange(rows)) if temperature else None
    what = f"{rows} x {columns}, {'Gumbel' if temperature else 'greedy'}{', tree' if parents else ''}"
    tokens = mx.zeros((rows,), dtype=mx.int32)
    return Case(verify_tail, what, (logits, tokens, temperature, noise, parents), logits)


def head(rows: int, columns: int, size: int, bits: int) -> Case:
    """The head and picks of draft rows, bfloat16."""
    x, *packed = quantised(rows, columns, size, bits)
    arguments = (x, *packed, 0.0, None, mx.arange(columns, dtype=mx.int32))
    what = f"{rows} x {columns} x {size}, {bits}-bit, reduced vocabulary"
    return Case(lm_head_pick, what, arguments, packed[:3])


def cases() -> list[Case]:
    """Shapes of SmolLM2-135M and of models of 1 to 8 billion weights."""
    products = list(itertools.product((2, 8, 16), (576, 2048), (1536, 2048), (4, 8)))[::3]
    tree = tuple(parent + 1 for parent in TREE)
    found = [tail(5, 49152, 0.0), tail(5, 49152, 0.8), tail(5, 151936, 0.0), tail(16, 49152, 0.0, tree)]
    for module, chosen in ((small_m_qmm, products), (row_exact, products[::2])):
        for rows, columns, size, bits in chosen:
            what = f"{rows} x {columns} x {size}, {bits}-bit"
            arguments = quantised(rows, columns, size, bits)
            found.append(Case(module, what, arguments, arguments[1:4]))
    found += [
        attention(9, 3, 64, 8, 1024),
        attention(32, 8, 128, 8, 2048),
        attention(32, 8, 128, 8, 2048, bits=8),
        attention(32, 8, 128, 16, 2048, tree=TREE),
    ]
    found += [lora(576, 1536, 16, 5, 8), lora(2048, 2048, 16, 5, 8), lora(2048, 2048, 64, 5, 8)]
    found += [head(1, 8192, 576, 4), head(4, 8192, 2048, 4), head(8, 8192, 2048, 8)]
    return found


def main() -> None:
    """Print the table as Markdown."""
    print("| kernel | call | launches | streamed / minimum | total / minimum |")
    print("|---|---|---|---|---|")
    for case in cases():
        launches, streamed, moved = measure(case)
        name = case.module.__name__.rsplit(".", 1)[-1]
        print(f"| `{name}` | {case.what} | {launches} | {streamed:.2f} | {moved:.2f} |")


if __name__ == "__main__":
    main()
