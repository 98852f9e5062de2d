"""Proves that a row of C-PTP counts by the probability that its teacher gives to what can be drafted."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.drafters.ptp.loss import PTPBatch, PTPLoss
from mtp_mlx.drafters.ptp.uniforms import teacher_logits
from mtp_mlx.drafters.slots.two_pass import prefix_pass
from tests.drafters.ptp.test_loss import dressed, layout_for, softmax


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_row_counts_by_what_the_teacher_would_have_drafted(temperature: float) -> None:
    """The probability of the draft columns is that of a softmax over the whole vocabulary; it scales the row's KL."""
    drafted = mx.array([1, 4, 9, 50], dtype=mx.int32)
    attached, layout = dressed("llama", draft_ids=drafted), layout_for(0)
    prefix = prefix_pass(attached, layout)
    rows = np.unique(layout.target)
    teacher, mass = teacher_logits(attached, prefix.hidden, rows, temperature)
    logits = np.array(attached.head(prefix.hidden[mx.array(rows)])).astype(np.float64)
    wanted = softmax(logits / temperature)[:, np.array(drafted)].sum(-1)
    np.testing.assert_allclose(np.array(mass), wanted, rtol=1e-4)
    assert 0 < wanted.min() < wanted.max() < 0.9
    count = len(rows)
    hidden = mx.random.normal((count, attached.hidden_size), key=mx.random.key(0))

    def losses(by: mx.array) -> np.ndarray:
        found = []
        for row in range(count):
            one = slice(row, row + 1)
            batch = PTPBatch(
                hidden=hidden[one],
                label=mx.array([0]),
                weight=mx.ones((1,)),
                greedy=mx.array([False]),
                teacher_row=mx.array([row]),
                teacher_logits=teacher,
                teacher_mass=by,
                weight_sum=1.0,
                row_count=1,
            )
            found.append(PTPLoss("kl", temperature)(attached, batch).total.item())
        return np.array(found)

    np.testing.assert_allclose(losses(mass), wanted * losses(mx.ones((count,))), rtol=1e-4)
