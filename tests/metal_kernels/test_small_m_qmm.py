"""Proves `small_m_qmm`: results within a float64 bound for every row count, dtype, width and group size, weights read
once, rows independent of their company bit for bit, rules of Metal kept, planted faults seen."""

from __future__ import annotations

import random
from collections.abc import Callable

import mlx.core as mx
import mslemu
import pytest

from mtp_mlx.metal_kernels import small_m_qmm
from mtp_mlx.metal_kernels.launch import Launch
from tests.metal_kernels import emulated
from tests.metal_kernels.quantised import (
    Product,
    assert_close,
    bound,
    doubles,
    random_product,
    result,
    same_bits,
)

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16

# Row count, N, K, group size, bits, dtype: all row counts 2..16; N below, on and beyond tiles of 4 and 16 columns;
# K of one group, and on and off the 128 values of a simdgroup's turn and the 512 of a threadgroup's.
CASES = [
    (2, 19, 32, 32, 4, F32),
    (3, 1, 64, 32, 4, F16),
    (4, 16, 576, 64, 4, BF16),
    (5, 37, 96, 32, 8, F32),
    (6, 17, 128, 128, 8, F16),
    (7, 3, 1536, 128, 4, BF16),
    (8, 33, 512, 64, 8, BF16),
    (9, 4, 640, 64, 8, F16),
    (10, 15, 544, 32, 4, F16),
    (11, 31, 384, 128, 8, BF16),
    (12, 5, 1024, 128, 4, F32),
    (13, 48, 160, 32, 8, BF16),
    (14, 2, 2112, 64, 4, F16),
    (15, 29, 192, 64, 8, F32),
    (16, 21, 672, 32, 4, BF16),
]
# The same shapes with the other types, so that every row count meets every type.
OTHER = {F32: F16, F16: BF16, BF16: F32}
CASES += [(*case[:5], OTHER[case[5]]) for case in CASES] + [
    (*case[:5], OTHER[OTHER[case[5]]]) for case in CASES
]


def expected_reads(product: Product) -> dict[str, int]:
    """Bytes a launch loads: weights, scales and biases once; x once for every four columns."""
    reads = {name: getattr(product, name).nbytes for name in ("w", "scales", "biases")}
    return reads | {"x": product.x.nbytes * -(-product.w.shape[0] // 4)}


def actual_reads(launch: Launch) -> dict[str, int]:
    read = emulated.traffic(launch)["read"]
    return {name: read[name] for name in ("w", "scales", "biases", "x")}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}x{c[1]}x{c[2]}-q{c[4]}g{c[3]}-{str(c[5])[9:]}")
def test_every_row_count_is_right_reads_weights_once_and_keeps_the_rules(case: tuple) -> None:
    product = random_product(*case)
    launch = small_m_qmm.launch(*product)
    emulated.assert_text_is_mlx(launch)
    outputs = [emulated.run(launch, schedule)[0] for schedule in emulated.SCHEDULES]
    assert all(same_bits(y, outputs[0]) for y in outputs)
    assert_close(outputs[0], product)
    assert actual_reads(launch) == expected_reads(product)
    assert emulated.traffic(launch)["written"]["y"] == outputs[0].nbytes


@pytest.mark.parametrize("columns", [151_936, 49_152, 50_021])  # two models' vocabularies and a prime
def test_vocabularies(columns: int) -> None:
    product = random_product(2, columns, 32, 32, 4, F32)
    launch = small_m_qmm.launch(*product)
    assert_close(emulated.run(launch)[0], product)
    assert actual_reads(launch) == expected_reads(product)


COUNTS = (2, 3, 5, 8, 13, 16)  # each is a compilation; the next test has them all


@pytest.mark.parametrize(("bits", "group_size", "dtype"), [(4, 64, BF16), (8, 32, F16)])
def test_a_rows_bits_do_not_depend_on_the_other_rows(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    rng, compared = random.Random(bits), 0
    for seed in range(200):
        columns, size = rng.randint(1, 40), group_size * rng.randint(1, 12)
        whole = random_product(16, columns, size, group_size, bits, dtype, seed)
        few, more = (
            rng.sample(range(16), count) for count in rng.sample(COUNTS, 2)
        )  # any rows, in any order
        ours, theirs = (fast(whole.rows(rows)) for rows in (few, more))
        for i in set(few) & set(more):
            compared += 1
            assert same_bits(ours[few.index(i)], theirs[more.index(i)]), (columns, size, seed, few, more)
    assert compared > 400


def test_every_row_count_gives_the_same_bits() -> None:
    whole = random_product(16, 37, 1088, 64, 4, BF16)
    every = fast(whole)
    for rows in range(2, 16):
        assert same_bits(fast(whole.rows(list(range(rows)))), every[:rows]), rows


def fast(product: Product) -> mx.array:
    """The result without checks: on Metal where there is one."""
    return emulated.run(small_m_qmm.launch(*product), mode="fast")[0]


@pytest.mark.parametrize("arguments", small_m_qmm.samples(), ids=lambda a: small_m_qmm.shape_key(*a))
def test_the_self_check_agrees_with_stock_mlx(arguments: tuple) -> None:
    theirs = small_m_qmm.reference(*arguments)
    ours = small_m_qmm.run(emulated.FACTORY, *arguments)
    assert small_m_qmm.agrees(ours, theirs)
    assert not small_m_qmm.agrees(ours * 1.25, theirs) and not small_m_qmm.agrees(ours[:1], theirs)


GOOD = random_product(4, 8, 64, 32, 4, F16)
REFUSED: list[tuple[str, dict]] = [
    ("1 rows", {"x": GOOD.x[:1]}),
    ("17 rows", {"x": mx.zeros((17, 64), F16)}),
    ("mode is mxfp4", {"mode": "mxfp4", "biases": None}),
    ("no biases", {"biases": None}),
    ("3 bits", {"bits": 3}),
    ("groups of 16", {"group_size": 16}),
    ("multiple of the group size 128", {"group_size": 128}),
    ("8 words per row of w, but 96", {"x": mx.zeros((4, 96), F16)}),
    ("float32", {"x": GOOD.x.astype(F32)}),
    ("float32", {"scales": GOOD.scales.astype(F32)}),
    ("bfloat16", {"biases": GOOD.biases.astype(BF16)}),
    ("int32", {"x": GOOD.x.astype(mx.int32)}),
    ("not uint32", {"w": GOOD.w.astype(mx.int32)}),
    ("3 and 2 dimensions", {"x": GOOD.x[None]}),
    ("(8, 1)", {"scales": GOOD.scales[:, :1]}),
    ("4 words, fewer than 8", random_product(2, 1, 32, 32, 4, F16)._asdict()),
]


@pytest.mark.parametrize(("reason", "change"), REFUSED, ids=[reason for reason, _ in REFUSED])
def test_refuses(reason: str, change: dict) -> None:
    arguments = {**GOOD._asdict(), **change}
    support = small_m_qmm.supported(**arguments)
    assert not support and reason in support.reason
    with pytest.raises(ValueError, match="small_m_qmm"):
        small_m_qmm.launch(**arguments)


def test_supports_what_it_runs() -> None:
    assert all(small_m_qmm.supported(*arguments) for arguments in small_m_qmm.samples())
    assert small_m_qmm.supported(*GOOD, "affine").ok


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup)"
MUTANTS = [
    ("no barrier before the simdgroups' sums are added", BARRIER + ";", ""),
    ("barrier without memory", "mem_flags::mem_threadgroup", "mem_flags::mem_none"),
    ("barrier for device memory", "mem_flags::mem_threadgroup", "mem_flags::mem_device"),
    ("barrier of one simdgroup", "threadgroup_barrier", "simdgroup_barrier"),
    ("reads one turn of K too far", "live = k < K", "live = k <= K"),
    ("reads one column too far", "first + c < N", "first + c <= N"),
    ("tail of K not masked", "if (k < K && first < N)", "if (first < N)"),
    ("tail of N not masked", "if (n < N)", "if (true)"),
    ("last value of K left out", "base < K;", "base < K - 127;"),
    ("every row uses row 0", "x + size_t(m) * size_t(K)", "x + size_t(0)"),
    ("row and column of y swapped", "size_t(m) * size_t(N) + size_t(n)", "size_t(n) * size_t(ROWS) + size_t(m)"),
    ("sums not initialised", "sums[c][m] = 0.0f;", ""),
    ("sums start from one", "sums[c][m] = 0.0f;", "sums[c][m] = 1.0f;"),
    ("half of the lanes' sums", "step < K_LANES", "step < K_LANES / 2"),
    ("one simdgroup's sum left out", "int s = 1; s < SPLITS", "int s = 2; s < SPLITS"),
    ("halves of a word overlap", "16 * (quad % 2)", "12 * (quad % 2)"),
    ("scale of the turn's first group", "float(scales[row * row_groups + size_t(k /",
     "float(scales[row * row_groups + size_t(base /"),
    ("scale and bias swapped", "fma(weight[c][j], scale[c], bias[c])", "fma(weight[c][j], bias[c], scale[c])"),
    ("bias taken from the wrong lane", "simd_shuffle(b, ushort(lane - k_lane % SHARE))", "b"),
    ("scales read by every lane", "if (k_lane % SHARE == 0)", "if (true)"),
    ("weights read for every row", "for (int m = 0; m < ROWS; m++) {\n          const vec",
     "for (int m = 0; m < ROWS; m++) {\n"
     "          words[0][0] = ((const volatile device uint*)w)[size_t(first) * row_words + size_t(k * BITS / 32)];\n"
     "          const vec"),
]  # fmt: skip


def is_seen(launch: Launch, product: Product) -> bool:
    """Whether check mode, the float64 bound or the traffic counters tell this launch from a right one."""
    try:
        (y,) = emulated.run(launch)
    except mslemu.KernelError:
        return True
    wrong = not (abs(doubles(y) - result(product)) <= bound(product)).all()
    return wrong or actual_reads(launch) != expected_reads(product)


@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_planted_faults_are_seen(old: str, new: str) -> None:
    product = random_product(5, 37, 608, 32, 4, F32)  # K ends within a turn, N within a lane's columns
    edit: Callable[[str], str] = lambda text: text.replace(old, new)  # noqa: E731
    launch = small_m_qmm.launch(*product)
    assert is_seen(emulated.edited(launch, edit), product)


def test_the_unchanged_kernel_is_not_seen_as_faulty() -> None:
    product = random_product(5, 37, 608, 32, 4, F32)
    assert not is_seen(small_m_qmm.launch(*product), product)
