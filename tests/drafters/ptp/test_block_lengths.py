"""PTP on blocks of different lengths: a slot's uniform, target and weight do not depend on the slots behind it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.drafters.ptp.config import TeacherSampling
from mtp_mlx.drafters.ptp.own_uniforms import with_own_uniforms
from mtp_mlx.drafters.ptp.targets import slot_targets
from mtp_mlx.drafters.ptp.uniforms import picker_of, teacher_rows, text_uniforms
from mtp_mlx.drafters.slots.layout import SlotLayout, build_layout
from mtp_mlx.drafters.slots.two_pass import prefix_pass
from tests.drafters.ptp.test_loss import ANCHORS, SEQUENCES, SLOTS, dressed, layout_for
from tests.drafters.slots.passes import whole_pass

LENGTHS = [np.array(own) for own in ([3, 1, 2, 1, 2], [2], [1, 3])]


@pytest.mark.parametrize("variant", ["o", "c"])
def test_shorter_blocks_have_the_targets_of_whole_ones(variant: Any) -> None:
    """Uniforms, labels and weights of every row that is left are those of its row in a whole block."""
    attached = dressed("llama", variant=variant)
    config = attached.speculator.config  # type: ignore[union-attr]

    def targets_by_row(layout: SlotLayout) -> dict[tuple[int, int], tuple[float, int, float]]:
        prefix = prefix_pass(attached, layout)
        rows = teacher_rows(attached, layout, prefix, picker_of(config.teacher))
        text = text_uniforms(layout, rows, 0.3, (1,))
        targets = slot_targets(layout, rows, text, config, np.zeros(layout.anchors.shape, dtype=bool), 0.9)
        keys = zip(layout.target.tolist(), layout.depth.tolist(), strict=True)
        carried = targets.carried.reshape(-1)[layout.rows].tolist()
        values = zip(carried, targets.label.tolist(), targets.weight.tolist(), strict=True)
        return dict(zip(keys, values, strict=True))

    whole = targets_by_row(layout_for(config.lead))
    layout = build_layout(SEQUENCES, ANCHORS, SLOTS, 2, config.lead, LENGTHS)
    found = targets_by_row(layout)
    assert len(found) == len(layout.rows) < len(whole)
    assert found == {key: whole[key] for key in found}


def test_own_uniforms_stay_inside_shorter_blocks() -> None:
    """A slot hands its uniform to the next one of its block only, and its gaps to none of another."""
    attached = dressed("llama", variant="c")
    config, picker = attached.speculator.config, picker_of(TeacherSampling())  # type: ignore[union-attr]
    layout = build_layout(SEQUENCES, ANCHORS, SLOTS, 2, lengths=LENGTHS)
    prefix = prefix_pass(attached, layout)
    rows = teacher_rows(attached, layout, prefix, picker)
    text = text_uniforms(layout, rows, 0.3, (1,))
    targets = slot_targets(layout, rows, text, config, np.zeros(layout.anchors.shape, dtype=bool), 1.0)
    columns = np.arange(attached.vocab_size)
    # The token that the first block's slot 1 predicts has no column: rows behind it cannot be trained.
    columns[layout.label[0]] = -1

    def hidden_states(carried: np.ndarray) -> mx.array:
        return whole_pass(attached, layout, prefix, carried)

    own = with_own_uniforms(attached, layout, targets, text, hidden_states, picker, columns, 1.0, (2,))
    changed = np.flatnonzero((own.carried != targets.carried).reshape(-1))
    assert len(changed) and layout.slot.reshape(-1)[changed].min() == 1
    flat, expected = layout.tokens.reshape(-1), []
    for target, depth in zip(layout.target.tolist(), layout.depth.tolist(), strict=True):
        between = flat[target - depth + 2 : target + 1]  # the tokens that slots before this one predict
        expected.append(0.0 if (columns[between] == -1).any() else 1.0)
    assert own.weight.tolist() == expected and 0 < expected.count(0.0) < len(expected)
