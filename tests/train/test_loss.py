"""Proves that ids which a model gives -inf add nothing to a loss or its gradient, instead of making them nan."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.drafters.heads.loss import kl_to_teacher, teacher_top
from mtp_mlx.drafters.masks.online_loss import Online
from mtp_mlx.drafters.ptp.loss import divergence
from mtp_mlx.train.loss import soft_cross_entropy

COLUMNS, LABEL = mx.arange(7), mx.array([0, 1])

Loss = Callable[[mx.array, mx.array], mx.array]

LOSSES: dict[str, Loss] = {
    "soft cross-entropy": lambda student, teacher: soft_cross_entropy(student, mx.softmax(teacher, axis=-1)),
    "kl": lambda student, teacher: divergence(teacher, student, "kl"),
    "reverse-kl": lambda student, teacher: divergence(teacher, student, "reverse-kl"),
    "heads": lambda student, teacher: kl_to_teacher(student, teacher_top(teacher, teacher.shape[-1])),
    "online": lambda student, teacher: Online("soft-teacher", COLUMNS).rows_loss(student, teacher, LABEL),
}


@pytest.mark.parametrize("name", LOSSES)
def test_ids_that_are_never_written(name: str) -> None:
    rng = np.random.default_rng(0)
    student, teacher = (mx.array(rng.normal(size=(2, 7)).astype(np.float32)) for _ in range(2))
    never = mx.full((2, 3), -mx.inf)
    wide = [mx.concatenate([logits, never], axis=1) for logits in (student, teacher)]

    def of(student: mx.array, teacher: mx.array) -> tuple[mx.array, mx.array]:
        return mx.value_and_grad(lambda logits: mx.sum(LOSSES[name](logits, teacher)))(student)

    (loss, gradient), (same, wider) = of(student, teacher), of(*wide)
    assert loss.item() > 0
    np.testing.assert_allclose(np.array(same), np.array(loss), rtol=1e-5)
    np.testing.assert_allclose(np.array(wider[:, :7]), np.array(gradient), rtol=1e-4, atol=1e-6)
    assert mx.all(wider[:, 7:] == 0).item()
