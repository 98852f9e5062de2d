"""Proves the losses of MTP heads against loops in float64 numpy, and that a student equal to its teacher loses 0."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.drafters.heads.loss import MTPDistil, kl_to_teacher, teacher_top


def naive(logits: np.ndarray, teacher: np.ndarray, label: int, settings: MTPDistil) -> float:
    """One row."""
    kept = max(1, round(settings.top_share * len(logits)))
    best = np.argsort(-teacher, kind="stable")[:kept]
    q = np.exp(teacher[best] / settings.temperature)
    p = np.exp(logits[best] / settings.temperature)
    q, p = q / q.sum(), p / p.sum()
    kl = settings.temperature**2 * (q * np.log(q / p)).sum()
    ce = 0.0 if label < 0 else -np.log(np.exp(logits[label]) / np.exp(logits).sum())
    return settings.ce_weight * ce + settings.kl_weight * kl


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    share=st.sampled_from([0.01, 0.08, 0.5, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    ce=st.sampled_from([0.0, 0.3, 1.0]),
    kl=st.sampled_from([0.0, 1.0, 1.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_a_loop_in_float64(
    rows: int, columns: int, share: float, temperature: float, ce: float, kl: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits, teacher = rng.normal(size=(2, rows, columns)) * 3
    label = rng.integers(-1, columns, rows)
    settings = MTPDistil(ce, kl, share, temperature)
    top = teacher_top(mx.array(teacher.astype(np.float32)), settings.kept(columns), temperature)
    found = settings.total(settings.rows_parts(mx.array(logits.astype(np.float32)), top, mx.array(label)))
    expected = [naive(*row, settings) for row in zip(logits, teacher, label, strict=True)]
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-4)


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
