"""A micro-batch of Parallel Token Prediction.

layout -> pass 1 (base model): KV, and the CDF intervals of the text's tokens -> uniforms inside them
-> pass 2 (slots that carry uniforms), slice by slice -> loss and gradients
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.ptp.config import PTPConfig
from mtp_mlx.drafters.ptp.loss import PTPBatch, PTPLoss
from mtp_mlx.drafters.ptp.own_uniforms import with_own_uniforms
from mtp_mlx.drafters.ptp.targets import SlotTargets, UniformChoice, slot_targets
from mtp_mlx.drafters.ptp.uniforms import picker_of, teacher_logits, teacher_rows, text_uniforms
from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.layout import Part, SlotLayout
from mtp_mlx.drafters.slots.step import BlockChoice, evaluate_constants
from mtp_mlx.drafters.slots.two_pass import Prefix, prefix_pass, slot_pass
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_columns
from mtp_mlx.train.loss import LossParts
from mtp_mlx.train.plan import WHOLE, StepPlan
from mtp_mlx.train.step import MicroBatchRunner, Totals

# Last element of the seeds (seed of the run, number of the micro-batch, ...) of its random numbers.
PLACES, GREEDY_BLOCKS, OWN_PLACES = 1, 2, 3


class PTPRunner(MicroBatchRunner):
    """Steps of a PTP adapter.

    Args:
        attached: the base model with the adapter.
        loss: of the slots.
        choice: which positions have a block of slots.
        uniforms: how the uniforms of the slots are drawn.
        seed: of the run.
        plan: slices and threads.
    """

    def __init__(
        self,
        attached: AttachedModel,
        loss: PTPLoss,
        choice: BlockChoice,
        uniforms: UniformChoice,
        seed: int,
        plan: StepPlan = WHOLE,
    ) -> None:
        super().__init__(adapter_of(attached), plan.workers)
        self._attached, self._loss, self._choice, self._uniforms = attached, loss, choice, uniforms
        self._seed, self._plan = seed, plan
        self._config: PTPConfig = adapter_of(attached).config
        self._picker = picker_of(self._config.teacher)
        self._columns = draft_columns(attached)
        if plan.workers > 1:
            evaluate_constants(attached, self._config.lead, uniform=0.5)

    def _micro_batch(self, examples: Sequence[Example], number: int) -> Totals:
        """See `MicroBatchRunner`."""
        layout = self._choice.layout(examples, self._seed, number, self._config.lead)
        with self._building:
            prefix = prefix_pass(self._attached, layout)
        mx.eval(prefix.arrays())
        targets = self._targets(layout, prefix, number)
        used = int(np.count_nonzero(targets.weight))  # the loss is a mean over these
        parts = layout.parts(self._plan.slice_rows)
        return used, *self._sum(self._loss_of(layout, prefix, targets, part) for part in parts)

    def _targets(self, layout: SlotLayout, prefix: Prefix, number: int) -> SlotTargets:
        """Inputs and targets of all slots of micro-batch `number`."""
        attached, choice = self._attached, self._choice
        teacher = teacher_rows(attached, layout, prefix, self._picker)
        text = text_uniforms(layout, teacher, self._uniforms.beta, (self._seed, number, PLACES))
        random = np.random.default_rng((self._seed, number, GREEDY_BLOCKS))
        drawn = (
            random.random(layout.tokens.shape) < self._uniforms.greedy_share
        )  # by anchor, however blocks are cut
        greedy = np.take_along_axis(drawn, layout.anchors, axis=1)
        targets = slot_targets(layout, teacher, text, self._config, greedy, choice.depth_decay)
        if self._uniforms.source != "own":
            return targets

        def hidden_states(carried: np.ndarray) -> mx.array:
            pieces = []
            for part in layout.parts(self._plan.slice_rows):
                with self._building:
                    pieces.append(slot_pass(attached, layout, prefix, part, carried))
                mx.eval(pieces[-1])
            return mx.concatenate(pieces)

        return with_own_uniforms(
            attached,
            layout,
            targets,
            text,
            hidden_states,
            self._picker,
            self._columns,
            choice.depth_decay,
            (self._seed, number, OWN_PLACES),
        )

    def _loss_of(
        self, layout: SlotLayout, prefix: Prefix, targets: SlotTargets, part: Part
    ) -> Callable[[], LossParts]:
        """The loss of a slice, whose teacher is evaluated now."""
        attached, own = self._attached, part.rows
        rows, row = np.unique(layout.target[own], return_inverse=True)
        teacher = mass = None
        if self._loss.name != "ce":
            teacher, mass = teacher_logits(attached, prefix.hidden, rows, self._picker.config.temperature)
        constants: dict[str, Any] = {
            "label": mx.array(self._columns[targets.label[own]]),
            "weight": mx.array(targets.weight[own]),
            "greedy": mx.array(targets.greedy[own]),
            "teacher_row": mx.array(row.astype(np.int32)),
            "weight_sum": float(targets.weight.sum()),
            "row_count": len(layout.rows),
        }

        def loss() -> LossParts:
            with self._plan.layers(attached):
                hidden = slot_pass(attached, layout, prefix, part, targets.carried)
            batch = PTPBatch(hidden=hidden, teacher_logits=teacher, teacher_mass=mass, **constants)
            return self._loss(attached, batch)

        return loss
