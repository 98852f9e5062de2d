"""Inverse-autoregressive training of a gated C-PTP adapter (arXiv 2512.21323, section 3): uniforms without a teacher.

    slot 1      carries a uniform from the base model's CDF interval of the token at its position
    slot j + 1  carries one from slot j's own CDF interval of the token at its position

That takes k - 1 passes without gradients, one after another. The first token of a block is the base model's in
decoding too. `inverse_ar.py` trains the whole model this way.

Legend: S sequences, T padded length, k slots, R slot rows per sequence, M supervised rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.ptp.targets import SlotTargets
from mtp_mlx.drafters.ptp.uniforms import TEACHER_CHUNK, TextUniforms, drawn_inside
from mtp_mlx.drafters.slots.layout import SlotLayout
from mtp_mlx.metal_kernels.inverse_cdf import interval
from mtp_mlx.model.attach import AttachedModel

# From what every slot carries, in the layout's chunks, to the hidden states of the supervised rows, [M, D].
SlotPass = Callable[[np.ndarray], mx.array]


def with_own_uniforms(
    attached: AttachedModel,
    layout: SlotLayout,
    targets: SlotTargets,
    text: TextUniforms,
    slot_pass: SlotPass,
    picker: Picker,
    columns: np.ndarray,
    depth_decay: float,
    seed: tuple[int, ...],
) -> SlotTargets:
    """`targets` with uniforms that pick the text's tokens under the slots' own distributions.

    Rows behind a token that these distributions cannot produce have weight 0. Greedy blocks are not changed.

    Args:
        layout: without a lead.
        targets: with the teacher's uniforms.
        text: the teacher's uniforms, for the first slot of every block.
        slot_pass: runs the slots.
        picker: of the sampling that defines the CDF.
        columns: [V] draft column of every id, -1 for ids outside the draft vocabulary.
        depth_decay: the loss of slot j has weight depth_decay ** (j - 1).
        seed: of NumPy's generator.
    """
    carried = targets.carried.copy()
    flat = carried.reshape(-1)  # a view
    place = np.random.default_rng(seed).random(len(layout.rows))
    stands = np.minimum(layout.positions().reshape(len(layout.tokens), -1), layout.tokens.shape[1] - 1)
    known = np.take_along_axis(text.reachable, stands, axis=1).reshape(-1)
    column = columns[layout.label]
    behind = layout.of_block(layout.lengths).reshape(-1)[layout.rows] > layout.depth  # rows with a next slot
    for depth in range(1, layout.slots):
        own = np.flatnonzero((layout.depth == depth) & behind & ~targets.greedy)
        if not len(own):
            break
        hidden, wanted = slot_pass(carried)[mx.array(own)], mx.array(np.maximum(column[own], 0))
        pieces = []
        for start in range(0, len(own), TEACHER_CHUNK):
            rows = slice(start, start + TEACHER_CHUNK)
            edges = interval(
                picker.scores(attached.draft_head(hidden[rows])), wanted[rows]
            )  # [<= chunk] each
            pieces.append([np.array(edge).astype(np.float64) for edge in edges])
        left, right = (np.concatenate(side) for side in zip(*pieces, strict=True))
        flat[layout.rows[own] + 1], reachable = drawn_inside(left, right, place[own])
        known[layout.rows[own] + 1] = reachable & (column[own] >= 0)
    unknown = np.concatenate([[0], np.cumsum(~known)])
    first = layout.rows - layout.slot.reshape(-1)[layout.rows]  # of the row's block
    so_far = unknown[layout.rows + 1] == unknown[first]
    weight = depth_decay ** (layout.depth - 1).astype(np.float32) * so_far
    weight = np.where(targets.greedy, targets.weight, weight).astype(np.float32)
    return replace(targets, carried=carried, weight=weight)
