"""Proves the losses of MTP heads against loops in float64 numpy, and that a student equal to its teacher loses 0."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.drafters.heads.loss import MTPDistil, kl_to_teacher, teacher_top
from tests.drafters.heads.naive_heads import Knobs, row_loss


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    outside=st.sampled_from([0, 1, 30]),
    share=st.sampled_from([0.01, 0.08, 0.5, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    ce=st.sampled_from([0.0, 0.3, 1.0]),
    kl=st.sampled_from([0.0, 1.0, 1.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_a_loop_in_float64(
    rows: int, columns: int, outside: int, share: float, temperature: float, ce: float, kl: float, seed: int
) -> None:
    """Of a vocabulary of which `outside` ids cannot be drafted."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, columns)) * 3
    teacher = rng.normal(size=(rows, columns + outside)) * 3
    drafted = np.sort(rng.permutation(columns + outside)[:columns]).tolist()
    label = rng.integers(-1, columns, rows)
    settings = MTPDistil(ce, kl, share, temperature)
    given = mx.array(teacher.astype(np.float32))
    top = settings.teacher(given[:, mx.array(drafted)], mx.logsumexp(given / temperature, axis=-1))
    found = settings.total(settings.rows_parts(mx.array(logits.astype(np.float32)), top, mx.array(label)))
    knobs = Knobs(ce, kl, share, temperature)
    expected = [
        row_loss(one, other, drafted, None if column < 0 else column, knobs)
        for one, other, column in zip(logits, teacher, label, strict=True)
    ]
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-4)


def test_a_row_counts_by_what_the_teacher_would_have_drafted() -> None:
    """Two rows with the same draft columns, to whose ids the teacher gives nearly all or 2 % of its probability."""
    student, teacher = mx.random.normal((2, 1, 40), key=mx.random.key(2))
    settings = MTPDistil(ce_weight=0.0, top_share=1.0)

    def gradient(outside: float) -> mx.array:
        normaliser = mx.logaddexp(mx.logsumexp(teacher, axis=-1), mx.array(outside))
        top = settings.teacher(teacher, normaliser)
        assert top.mass.item() == pytest.approx(mx.exp(mx.logsumexp(teacher) - normaliser).item(), rel=1e-5)
        return mx.grad(lambda z: settings.rows_parts(z, top, mx.array([-1]))["kl"].sum())(student)

    inside = mx.logsumexp(teacher).item()
    ratio = mx.linalg.norm(gradient(inside + np.log(49.0))) / mx.linalg.norm(gradient(-1e9))
    assert ratio.item() == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_without_cross_entropy_a_choice_outside_the_distilled_columns_costs(share: float) -> None:
    """The student agrees with the teacher on all distilled columns, and would draft another one."""
    teacher = mx.random.normal((1, 40), key=mx.random.key(3)) * 2
    worst = mx.argmin(teacher[0]).item()
    student = mx.where(mx.arange(40) == worst, teacher.max() + 5.0, teacher)
    settings = MTPDistil(ce_weight=0.0, top_share=share)
    top = settings.teacher(teacher, mx.logsumexp(teacher, axis=-1))

    def loss(z: mx.array) -> mx.array:
        return settings.rows_parts(z, top, mx.array([-1]))["kl"].sum()

    value, gradient = mx.value_and_grad(loss)(student)
    assert value.item() > 0.5 and gradient[0, worst].item() > 0.1
    assert loss(teacher + 3.0).item() == pytest.approx(0, abs=1e-5)
    paper = MTPDistil(ce_weight=1.0, top_share=share)
    top = paper.teacher(teacher, mx.logsumexp(teacher, axis=-1))
    assert not top.with_rest, "with cross-entropy, MTP-D's own loss: renormalised over the distilled columns"


def test_a_student_equal_to_its_teacher_loses_nothing_and_one_row_off_does() -> None:
    teacher = mx.random.normal((6, 50), key=mx.random.key(0)) * 4
    same = kl_to_teacher(teacher + 7.0, teacher_top(teacher, 4))
    assert mx.abs(same).max().item() < 1e-5, "logits differ by a constant only"
    assert kl_to_teacher(teacher[:-1], teacher_top(teacher[1:], 4)).min().item() > 1e-2


@pytest.mark.parametrize("kept", [3, 50])
def test_gradients_reach_the_student_alone(kept: int) -> None:
    student, teacher = mx.random.normal((2, 6, 50), key=mx.random.key(1))

    def loss(student: mx.array, teacher: mx.array) -> mx.array:
        return mx.sum(kl_to_teacher(student, teacher_top(teacher, kept)))

    to_student, to_teacher = mx.grad(loss, argnums=(0, 1))(student, teacher)
    assert mx.abs(to_teacher).max().item() == 0
    touched = (mx.abs(to_student) > 1e-9).sum(axis=-1)
    assert mx.array_equal(touched, mx.full((6,), kept)).item()


def test_head_weights() -> None:
    assert MTPDistil().head_weights(range(1, 5)) == [0.25] * 4
    assert MTPDistil(decay=0.6).head_weights([1, 2, 3]) == pytest.approx([0.5102, 0.3061, 0.1837], abs=1e-4)
