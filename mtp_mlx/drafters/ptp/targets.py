"""The uniforms that slots carry in a step of Parallel Token Prediction, and the tokens that they predict.

Legend: S sequences, N blocks per sequence, C rows per chunk, M supervised rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mtp_mlx.drafters.ptp.config import PTPConfig
from mtp_mlx.drafters.ptp.uniform_embedding import NOTHING
from mtp_mlx.drafters.ptp.uniforms import TeacherRows, TextUniforms, carried_uniforms, known_so_far
from mtp_mlx.drafters.slots.layout import SlotLayout

UniformSource = Literal["teacher", "own"]


@dataclass(frozen=True)
class UniformChoice:
    """How the uniforms of a run are drawn.

    Attributes:
        beta: uniforms are distributed as Beta(beta, beta) within their CDF interval.
        greedy_share: fraction of the blocks whose slots carry no uniforms and learn the most likely tokens, for
            decoding at temperature 0.
        source: whose CDF: the teacher's, or the slots' own (see `own_uniforms.py`; evenly distributed then).
    """

    beta: float = 0.3
    greedy_share: float = 0.0
    source: UniformSource = "teacher"


@dataclass(frozen=True)
class SlotTargets:
    """Inputs and targets of the slots of a layout.

    Attributes:
        carried: [S * chunks, C] float32 uniforms; NOTHING where a slot carries none.
        label: [M] int32 token to predict.
        weight: [M] float32 weight of the loss.
        greedy: [M] bool, see `PTPBatch`.
    """

    carried: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    greedy: np.ndarray


def slot_targets(
    layout: SlotLayout,
    teacher: TeacherRows,
    text: TextUniforms,
    config: PTPConfig,
    greedy_blocks: np.ndarray,
    depth_decay: float,
) -> SlotTargets:
    """Inputs and targets of a micro-batch's slots.

    Rows have weight 0 if the teacher's sampling could not have produced their token, or one between it and the
    anchor. In greedy blocks, rows behind a token that is not the most likely one have weight 0: greedy decoding does
    not write that text.

    Args:
        greedy_blocks: [S, N] bool, blocks for temperature 0.
    """
    greedy = layout.of_block(greedy_blocks).reshape(-1)  # of every slot row
    carried = carried_uniforms(layout, text.values)
    nothing = np.ones_like(greedy) if config.independent else greedy
    carried = np.where(nothing.reshape(carried.shape), np.float32(NOTHING), carried)
    own = greedy[layout.rows]
    likeliest = teacher.likeliest[np.searchsorted(teacher.rows, layout.target)]
    usable = np.where(
        own, known_so_far(layout, text.greedy, own=False), known_so_far(layout, text.reachable, own=True)
    )
    decay = depth_decay ** np.maximum(layout.depth - 1, 0).astype(np.float32)
    return SlotTargets(
        carried=carried.astype(np.float32),
        label=np.where(own, likeliest, layout.label),
        weight=(decay * usable).astype(np.float32),
        greedy=own,
    )
