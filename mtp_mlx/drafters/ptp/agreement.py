"""Acceptance of PTP drafts on held-out text, measured without decoding; see `mtp_mlx.train.agreement`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.ptp.config import PTPConfig
from mtp_mlx.drafters.ptp.targets import slot_targets
from mtp_mlx.drafters.ptp.uniforms import known_so_far, picker_of, teacher_rows, text_uniforms
from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.agreement import labelled_anchors
from mtp_mlx.drafters.slots.layout import build_layout
from mtp_mlx.drafters.slots.two_pass import prefix_pass, slot_states
from mtp_mlx.metal_kernels.inverse_cdf import inverse_cdf
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.agreement import Agreement, Tally
from mtp_mlx.train.data import Example

PLACES = 1  # last element of the seeds of the places inside intervals


def measure_ptp(
    attached: AttachedModel, batches: Iterable[Sequence[Example]], slots: int, most: int = 24, seed: int = 0
) -> Agreement:
    """Acceptance per depth, teacher-forced, with uniforms drawn evenly inside the CDF intervals of the text's tokens.

    On text that was sampled as the adapter's teacher samples, this is the acceptance of decoding. Blocks with a token
    that this sampling cannot produce are left out.

    Args:
        slots: drafts per block.
        most: blocks per sequence, at random positions.
        seed: of positions and uniforms.
    """
    config: PTPConfig = adapter_of(attached).config
    picker = picker_of(config.teacher)
    tally = Tally(slots)
    random = np.random.default_rng(seed)
    for number, examples in enumerate(batches):
        anchors = labelled_anchors(examples, slots, most, random)
        if not any(len(own) for own in anchors):
            continue
        layout = build_layout(
            [example.tokens for example in examples], anchors, slots, min(most, 16), config.lead
        )
        prefix = prefix_pass(attached, layout)
        teacher = teacher_rows(attached, layout, prefix, picker)
        text = text_uniforms(layout, teacher, 1.0, (seed, number, PLACES))
        greedy = np.full(layout.anchors.shape, picker.config.temperature == 0)
        targets = slot_targets(layout, teacher, text, config, greedy, 1.0)
        hidden = slot_states(attached, layout, prefix, targets.carried)
        right = drafted_ids(attached, config, hidden, text.values.reshape(-1)[layout.target + 1])
        reachable = known_so_far(layout, text.reachable, own=True).reshape(-1, layout.slots).all(axis=1)
        tally.add((right == layout.label).reshape(-1, layout.slots)[reachable, config.lead :])
    return tally.agreement()


def drafted_ids(
    attached: AttachedModel, config: PTPConfig, hidden: mx.array, uniforms: np.ndarray
) -> np.ndarray:
    """Drafted ids [M] of the slots' hidden states [M, D], given the uniforms [M] of the tokens they predict."""
    logits = attached.draft_head(hidden)
    picker = picker_of(config.teacher)
    if config.variant == "o" or picker.config.temperature == 0:
        columns = mx.argmax(logits.astype(mx.float32), axis=-1)
    else:
        columns = inverse_cdf(picker.scores(logits), mx.array(uniforms))
    ids = attached.draft_ids
    return np.array(columns if ids is None else ids[columns])
