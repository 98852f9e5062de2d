"""What the slots of a training step of Parallel Token Prediction carry, and what they must predict.

Legend: S sequences, T padded length, N blocks per sequence, k rows of a block, M supervised rows.
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
    """What slots carry in training.

    Attributes:
        beta: the place of a uniform inside its interval is Beta(beta, beta).
        greedy_share: share of the blocks whose slots carry nothing and learn the likeliest tokens, as decoding at
            temperature 0 wants them.
        source: whose intervals they lie in: the teacher's, or the slots' own (see `own_uniforms.py`), evenly then.
    """

    beta: float = 0.3
    greedy_share: float = 0.0
    source: UniformSource = "teacher"


@dataclass(frozen=True)
class SlotTargets:
    """What the supervised rows of a layout carry and must predict.

    Attributes:
        carried: [S * chunks, G * k] float32 uniforms, NOTHING where a slot carries none.
        label: [M] int32 token.
        weight: [M] float32.
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
    """Rows whose token, or one before it behind the anchor, the teacher's sampling cannot give have weight 0; so have
    rows of greedy blocks behind a token that is not the likeliest: that text is not what greedy decoding writes.

    Args:
        greedy_blocks: [S, N] bool, blocks that stand for temperature 0.
    """
    greedy = np.repeat(greedy_blocks.reshape(-1), layout.slots)  # of every slot row
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
