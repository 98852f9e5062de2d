"""gated_lora equals y + scale * (x @ down) @ up in float64 on slot rows and never reads a byte of the rows before."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from mtp_mlx.metal_kernels import gated_lora as lora
from mtp_mlx.metal_kernels.launch import Launch
from tests.metal_kernels import emulated
from tests.metal_kernels.lora_calls import (
    BF16,
    BOUND,
    F16,
    F32,
    Case,
    answer,
    call,
    distance,
    executions,
    once,
    twice,
)

# Every number of slot rows; then every type over each tile's edge: 64 inputs, 64 ranks, 256 threads, 512 columns.
ROWS = [
    Case(dtype, slots, slots % 4, 67, 131, 12) for dtype in (F16, BF16, F32) for slots in (*range(1, 18), 32)
]
EDGES = [
    Case(F32, 3, 2, 64, 513, 5),
    Case(F32, 11, 1, 129, 257, 65),
    Case(F32, 32, 0, 190, 100, 128),
    Case(F16, 7, 3, 200, 1025, 100),
    Case(F16, 2, 0, 31, 511, 256),
    Case(BF16, 6, 4, 63, 515, 64),
    Case(BF16, 16, 2, 257, 127, 33),
    Case(BF16, 1, 0, 320, 4099, 1),
]


@pytest.mark.parametrize("go", [once, twice])
@pytest.mark.parametrize("case", ROWS + EDGES, ids=str)
def test_equals_float64_under_every_schedule(case: Case, go: Callable[..., mx.array]) -> None:
    arguments = call(case)
    wanted = answer(*arguments)
    for execute in executions():
        assert distance(go(arguments, execute), wanted) <= BOUND[case.dtype]


def test_rank_256_with_32_slot_rows_takes_two_launches() -> None:
    arguments = call(Case(F16, 32, 1, 130, 70, 256))
    assert distance(twice(arguments), answer(*arguments)) <= BOUND[F16]
    with pytest.raises(ValueError, match="49152 bytes .* 32768"):
        lora.launch(*arguments)


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_text_is_what_mlx_compiles(case: Case) -> None:
    _, y, _, up, n_real, scale = arguments = call(case)
    down = lora.launch_down(*arguments)
    hidden = mx.zeros(down.output_shapes[0])
    for launch in (lora.launch(*arguments), down, lora.launch_up(hidden, y, up, n_real, scale)):
        emulated.assert_text_is_mlx(launch)


@pytest.mark.parametrize("n_real", [0, 9])
def test_one_launch_reads_slot_rows_and_up_once(n_real: int) -> None:
    arguments = call(Case(F16, 5, n_real, 150, 1100, 20))
    launch = lora.launch(*arguments)
    (out,) = emulated.run(launch)
    moved, readers = emulated.traffic(launch), 3
    assert moved["read"]["x"] == readers * 5 * 150 * 2
    assert moved["read"]["down"] == readers * 150 * 20 * 2
    assert moved["read"]["y"] == 5 * 1100 * 2
    assert moved["read"]["up"] == 20 * 1100 * 2
    assert moved["written"] == {"out": out.nbytes}


@pytest.mark.parametrize("n_real", [0, 9])
def test_two_launches_read_both_factors_once(n_real: int) -> None:
    _, y, _, up, _, scale = arguments = call(Case(BF16, 5, n_real, 650, 600, 70))
    launch = lora.launch_down(*arguments)
    (hidden,) = emulated.run(launch)
    moved = emulated.traffic(launch)
    assert hidden.shape[0] > 1
    assert moved["read"]["x"] == 2 * 5 * 650 * 2  # once for each 64 columns of down
    assert moved["read"]["down"] == 650 * 70 * 2
    assert moved["written"] == {"hidden": hidden.nbytes}
    launch = lora.launch_up(hidden, y, up, n_real, scale)
    (out,) = emulated.run(launch)
    moved = emulated.traffic(launch)
    assert moved["read"]["hidden"] == 3 * hidden.nbytes  # once for each 256 columns of up
    assert moved["read"]["y"] == 5 * 600 * 2
    assert moved["read"]["up"] == 70 * 600 * 2
    assert moved["written"] == {"out": out.nbytes}


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_the_rule_counts_the_bytes_that_move(case: Case) -> None:
    _, y, _, up, n_real, scale = arguments = call(case)
    size = case.dtype.size
    one, two = lora.bytes_moved(case.slots, case.inputs, case.outputs, case.rank, size)
    (hidden,) = emulated.run(down := lora.launch_down(*arguments))
    emulated.run(above := lora.launch_up(hidden, y, up, n_real, scale))
    emulated.run(fused := lora.launch(*arguments))

    def moved(launch: Launch) -> int:
        bytes_of, arrays = emulated.traffic(launch), ("x", "y", "down", "up", "hidden")
        return sum(bytes_of["read"].get(a, 0) for a in arrays) + sum(bytes_of["written"].values())

    assert moved(fused) == one
    assert moved(down) + moved(above) <= two  # fewer parts where the inputs are few


def test_one_launch_where_the_docstring_says() -> None:
    def ranks(inputs: int, outputs: int) -> list[int]:
        return [rank for rank in range(1, 257) if lora.takes_one_launch(8, inputs, outputs, rank, 2)]

    assert ranks(576, 1536) == [*range(1, 257)]
    assert ranks(2048, 2048) == [*range(1, 42)]
    assert ranks(4096, 14336) == [1]


def test_agrees_with_mlx_on_the_samples() -> None:
    launches = set()
    for sample in lora.samples():
        x, y, down, _, n_real, _ = sample
        launches.add(
            lora.takes_one_launch(x.shape[0] - n_real, x.shape[1], y.shape[1], down.shape[1], x.dtype.size)
        )
        ours, theirs = lora.run(emulated.FACTORY, *sample), lora.reference(*sample)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert lora.agrees(ours, theirs)
        assert not lora.agrees(ours * 1.1, theirs)
    assert launches == {True, False}


def test_what_is_not_supported_says_why() -> None:
    x, y, down, up, n_real, scale = call(Case(F16, 3, 2, 40, 50, 8))
    assert lora.supported(x, y, down, up, n_real, scale)
    for arguments, reason in (
        ((x.astype(mx.int32), y, down, up, n_real), "int32"),
        ((x, y.astype(F32), down, up, n_real), "float32"),
        ((x, y, mx.zeros((40, 257), F16), up, n_real), "257"),
        ((mx.zeros((35, 40), F16), y, down, up, n_real), "33"),
        ((x, y, down[:5, :1], up, n_real), "fewer than 8"),
    ):
        assert reason in lora.supported(*arguments, scale).reason


def test_shapes_that_do_not_fit_are_refused_with_both_numbers() -> None:
    x, y, down, up, n_real, scale = call(Case(F16, 3, 2, 40, 50, 8))
    for arguments, numbers in (
        ((x, y, down, up, 5), ("5", "5")),
        ((x, y[1:], down, up, n_real), ("5", "4")),
        ((x, y, down[1:], up, n_real), ("40", "39")),
        ((x, y, down, up[1:], n_real), ("8", "7")),
        ((x[0], y, down, up, n_real), ("1", "2")),
    ):
        for make in (lora.launch, lora.launch_down):
            with pytest.raises(ValueError) as error:
                make(*arguments, scale)
            assert all(number in str(error.value) for number in numbers)
    with pytest.raises(ValueError, match="4.*3"):
        lora.launch_up(mx.zeros((2, 4, 8)), y, up, n_real, scale)


def test_shape_key_tells_classes_apart() -> None:
    assert lora.shape_key(*call(Case(F16, 3, 2, 40, 50, 8))) == "float16 3x40x50 rank 8"
