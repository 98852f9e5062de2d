"""Proves `row_exact`: the bits of MLX's own one-row kernels (their installed text, emulated) for every width, group,
dtype and row count, weights read once for all rows, rules of Metal kept, planted faults seen."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import mlx.core as mx
import mslemu
import pytest

from mtp_mlx.metal_kernels import row_exact
from mtp_mlx.metal_kernels.launch import Launch
from tests.metal_kernels import emulated
from tests.metal_kernels.mlx_one_row import kernel_name, mlx_one_row
from tests.metal_kernels.quantised import Product, assert_close, cancelling_product, random_product, same_bits

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16

# Row count, N, K, group size, bits, dtype: all row counts 2..16, all of MLX's kernels; N below, on and beyond the 4
# columns of a simdgroup and the 8 of a threadgroup (64 for 4 lanes), K within, on and beyond a turn.
CASES = [
    (2, 19, 512, 32, 4, F32),
    (3, 1, 1024, 64, 4, F16),
    (4, 16, 576, 64, 4, BF16),
    (5, 37, 96, 32, 8, F32),
    (6, 17, 128, 128, 8, F16),
    (7, 3, 1536, 128, 4, BF16),
    (8, 33, 256, 64, 8, BF16),
    (9, 4, 640, 64, 8, F16),
    (10, 15, 544, 32, 4, F16),
    (11, 31, 384, 128, 8, BF16),
    (12, 5, 640, 128, 4, F32),
    (13, 71, 64, 32, 8, BF16),
    (14, 2, 64, 64, 4, F16),
    (15, 29, 768, 64, 8, F32),
    (16, 21, 32, 32, 4, BF16),
]
# The same shapes with the other types, so that every row count meets every type.
OTHER = {F32: F16, F16: BF16, BF16: F32}
CASES += [(*case[:5], OTHER[case[5]]) for case in CASES] + [
    (*case[:5], OTHER[OTHER[case[5]]]) for case in CASES
]


def actual_reads(launch: Launch) -> dict[str, int]:
    read = emulated.traffic(launch)["read"]
    return {name: read[name] for name in ("w", "scales", "biases", "x")}


def expected_reads(product: Product) -> dict[str, int]:
    """Bytes a launch loads: weights, scales and biases once; x once per lane's columns, 4 (or 1 in quads)."""
    reads = {name: getattr(product, name).nbytes for name in ("w", "scales", "biases")}
    columns = 1 if product.x.shape[1] in (64, 128) else 4
    return reads | {"x": product.x.nbytes * -(-product.w.shape[0] // columns)}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}x{c[1]}x{c[2]}-q{c[4]}g{c[3]}-{str(c[5])[9:]}")
def test_every_row_count_has_mlx_bits_reads_weights_once_and_keeps_the_rules(case: tuple) -> None:
    for product in (random_product(*case), cancelling_product(*case)):
        launch = row_exact.launch(*product)
        outputs = [emulated.run(launch, schedule)[0] for schedule in emulated.SCHEDULES]
        emulated.assert_text_is_mlx(launch)
        assert_close(outputs[0], product)
        theirs = mlx_one_row(product)
        assert all(same_bits(y, theirs) for y in outputs)
        assert actual_reads(launch) == expected_reads(product)
        assert emulated.traffic(launch)["written"]["y"] == outputs[0].nbytes


SHAPES = 24  # per width, group size and dtype: 216 per width


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_bits_equal_mlx_own_kernel_text(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    rng = random.Random(f"{bits} {group_size} {dtype}")
    rows = rng.randint(2, 16)  # one count here: each is a compilation, and the cases above have them all
    block = 64 * (32 // bits)  # values of K per turn of the fast kernel
    ran = set()
    for seed in range(SHAPES):
        columns = 8 * rng.randint(1, 5) - (rng.randint(1, 7) if group_size == 64 else 0)
        sizes = [
            block * rng.randint(1, 2),
            group_size * rng.choice([3, 5, 7, 9, 11]),
            64 if group_size == 32 else 128,
        ]
        make = random_product if seed % 4 == 0 else cancelling_product
        product = make(rows, columns, sizes[seed % 3], group_size, bits, dtype, seed)
        (ours,) = emulated.run(row_exact.launch(*product), mode="fast")
        assert same_bits(ours, mlx_one_row(product)), (rows, columns, sizes[seed % 3], seed)
        ran.add(kernel_name(columns, sizes[seed % 3], bits)[0])
    assert ran == {"affine_qmv_fast", "affine_qmv", "affine_qmv_quad"}


@pytest.mark.parametrize("columns", [151_936, 49_152, 50_021])  # two models' vocabularies and a prime
def test_vocabularies(columns: int) -> None:
    product = random_product(2, columns, 32, 32, 4, F32)
    launch = row_exact.launch(*product)
    assert same_bits(emulated.run(launch)[0], mlx_one_row(product))
    assert actual_reads(launch) == expected_reads(product)


@pytest.mark.parametrize(("bits", "values"), [(4, 8), (8, 4)])
def test_the_comparison_tells_orders_apart(bits: int, values: int) -> None:
    product = cancelling_product(3, 8, 512, 64, bits, F32)
    launch = row_exact.launch(*product)
    template = tuple((name, values if name == "VALUES" else value) for name, value in launch.template)
    (slow_order,) = emulated.run(dataclasses.replace(launch, template=template), mode="fast")
    assert not same_bits(slow_order, mlx_one_row(product))
    assert_close(slow_order, product)


@pytest.mark.parametrize("arguments", row_exact.samples(), ids=lambda a: row_exact.shape_key(*a))
def test_the_self_check_agrees_with_stock_mlx(arguments: tuple) -> None:
    theirs = row_exact.reference(*arguments)
    ours = row_exact.run(emulated.FACTORY, *arguments)
    assert row_exact.agrees(ours, theirs)
    assert not row_exact.agrees(ours * 1.25, theirs) and not row_exact.agrees(ours[:1], theirs)


def test_the_self_check_covers_every_order_width_and_dtype() -> None:
    samples = [Product(*arguments) for arguments in row_exact.samples()]
    orders = {(p.bits, row_exact.one_row_order(p.x.shape[1], p.bits)) for p in samples}
    assert orders >= {(4, (32, 16)), (4, (32, 8)), (8, (32, 8)), (8, (32, 4)), (4, (4, 16)), (8, (4, 32))}
    assert {p.x.dtype for p in samples} == {F32, F16, BF16}


GOOD = random_product(4, 8, 64, 32, 4, F16)
REFUSED: list[tuple[str, dict]] = [
    ("1 rows", {"x": GOOD.x[:1]}),
    ("17 rows", {"x": mx.zeros((17, 64), F16)}),
    ("mode is nvfp4", {"mode": "nvfp4", "biases": None}),
    ("no biases", {"biases": None}),
    ("2 bits", {"bits": 2}),
    ("multiple of the group size 128", {"group_size": 128}),
    ("float32", {"x": GOOD.x.astype(F32)}),
]


@pytest.mark.parametrize(("reason", "change"), REFUSED, ids=[reason for reason, _ in REFUSED])
def test_refuses(reason: str, change: dict) -> None:
    arguments = {**GOOD._asdict(), **change}
    support = row_exact.supported(**arguments)
    assert not support and reason in support.reason
    with pytest.raises(ValueError, match="row_exact"):
        row_exact.launch(**arguments)


FAST, SLOW, QUAD = (5, 13, 512, 64, 4, F32), (5, 13, 608, 32, 4, F32), (5, 70, 64, 32, 4, F32)
BYTES = (5, 13, 608, 32, 8, F32)  # 8-bit
LOAD_A_ROW = "const float x_sum"
MUTANTS = [
    ("reads one lane of K too far", SLOW, "live = k < K", "live = k <= K"),
    ("reads one column too far", SLOW, "first + c < N;", "first + c <= N;"),
    ("tail of K not masked", SLOW, "if (k < K && first < N)", "if (first < N)"),
    ("tail of N not masked", SLOW, "k_lane == 0 && first + c < N", "k_lane == 0"),
    ("last turn left out", SLOW, "base < K;", "base + LANES * VALUES <= K;"),
    ("every row uses row 0", FAST, "x + size_t(m) * size_t(K)", "x + size_t(0)"),
    ("row and column of y swapped", FAST, "size_t(m) * size_t(N) + size_t(first + c)",
     "size_t(first + c) * size_t(ROWS) + size_t(m)"),
    ("sums not initialised", FAST, "sums[c][m] = 0.0f;", ""),
    ("sums start from one", FAST, "sums[c][m] = 0.0f;", "sums[c][m] = 1.0f;"),
    ("only the first simdgroup's columns", FAST, "k_lane == 0 &&", "simdgroup == 0 && k_lane == 0 &&"),
    ("bias taken from the wrong lane", FAST, "simd_shuffle(b, ushort(lane - k_lane % SHARE))", "b"),
    ("scale of the turn's first group", FAST, "float(scales[row * row_groups + size_t(k /",
     "float(scales[row * row_groups + size_t(base /"),
    ("quads: one column per simdgroup stored", QUAD, "if (k_lane == 0 &&", "if (lane == 0 &&"),
    ("quads: sum over the simdgroup", QUAD, "LANES == 32 ? simd_sum", "LANES >= 4 ? simd_sum"),
    ("halves of a word overlap", FAST, "16 * (i / 4)", "12 * (i / 4)"),
    ("products added one by one", FAST, "dot += xs[i] * a + xs[i + 1] * b +",
     "dot += xs[i] * a; dot += xs[i + 1] * b; dot +="),
    ("x added one by one", FAST, "sum += a + b + c + d", "sum += a; sum += b; sum += c; sum += d"),
    ("8 bits: two products added at once", BYTES, "dot += xs[i + 2] * c;\n      dot +=", "dot += xs[i + 2] * c +"),
    ("scale, dot and bias contracted", FAST, "scale * dot + x_sum * bias", "fma(scale, dot, x_sum * bias)"),
    ("x divided by the wrong power", FAST, "c / 256.0f", "c / 16.0f"),
    ("scales read by every lane", FAST, "live && k_lane % SHARE == 0", "live"),
    ("weights read for every row", FAST, LOAD_A_ROW,
     "unpack<BITS>(((const volatile device uint*)w)[size_t(first) * row_words + size_t(k / PER_WORD)], values[0]);\n"
     + LOAD_A_ROW),
]  # fmt: skip


def is_seen(launch: Callable[[Product], Launch], case: tuple) -> bool:
    """Whether check mode, MLX's bits or the traffic counters tell this kernel from a right one."""
    for product in (random_product(*case), cancelling_product(*case)):
        try:
            (y,) = emulated.run(launch(product))
        except mslemu.KernelError:
            return True
        if not same_bits(y, mlx_one_row(product)) or actual_reads(launch(product)) != expected_reads(product):
            return True
    return False


@pytest.mark.parametrize(("case", "old", "new"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_planted_faults_are_seen(case: tuple, old: str, new: str) -> None:
    def faulty(product: Product) -> Launch:
        return emulated.edited(row_exact.launch(*product), lambda text: text.replace(old, new))

    assert is_seen(faulty, case)


@pytest.mark.parametrize("case", [FAST, SLOW, QUAD, BYTES], ids=["fast", "slow", "quad", "bytes"])
def test_the_unchanged_kernel_is_not_seen_as_faulty(case: tuple) -> None:
    assert not is_seen(lambda product: row_exact.launch(*product), case)
