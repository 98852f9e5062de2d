"""A micro-batch of Parallel Token Prediction.

layout -> pass 1 (base model): KV, and the CDF intervals of the text's tokens -> uniforms inside them
-> pass 2 (slots that carry uniforms) -> loss and gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.ptp.config import PTPConfig
from mtp_mlx.drafters.ptp.loss import PTPBatch, PTPLoss
from mtp_mlx.drafters.ptp.own_uniforms import with_own_uniforms
from mtp_mlx.drafters.ptp.targets import UniformChoice, slot_targets
from mtp_mlx.drafters.ptp.uniforms import picker_of, teacher_rows, text_uniforms
from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.step import BlockChoice, evaluate_constants
from mtp_mlx.drafters.slots.two_pass import prefix_pass, slot_pass
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_columns
from mtp_mlx.train.grad_checkpoint import checkpointed_layers
from mtp_mlx.train.loss import LossParts
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
        workers: see `MicroBatchRunner`.
        grad_checkpoint: whether layers are recomputed in the backward pass.
    """

    def __init__(
        self,
        attached: AttachedModel,
        loss: PTPLoss,
        choice: BlockChoice,
        uniforms: UniformChoice,
        seed: int,
        workers: int = 1,
        grad_checkpoint: bool = False,
    ) -> None:
        super().__init__(adapter_of(attached), workers)
        self._attached, self._loss, self._choice, self._uniforms = attached, loss, choice, uniforms
        self._seed, self._grad_checkpoint = seed, grad_checkpoint
        self._config: PTPConfig = adapter_of(attached).config
        self._picker = picker_of(self._config.teacher)
        self._columns = draft_columns(attached)
        if workers > 1:
            evaluate_constants(attached, self._config.lead, uniform=0.5)

    def _micro_batch(self, examples: Sequence[Example], number: int) -> Totals:
        """See `MicroBatchRunner`."""
        attached, choice = self._attached, self._choice
        layout = choice.layout(examples, self._seed, number, self._config.lead)
        with self._building:
            prefix = prefix_pass(attached, layout)
        mx.eval(prefix.arrays())
        teacher = teacher_rows(attached, layout, prefix, self._picker, self._loss.name != "ce")
        text = text_uniforms(layout, teacher, self._uniforms.beta, (self._seed, number, PLACES))
        random = np.random.default_rng((self._seed, number, GREEDY_BLOCKS))
        greedy = random.random(layout.anchors.shape) < self._uniforms.greedy_share
        targets = slot_targets(layout, teacher, text, self._config, greedy, choice.depth_decay)
        if self._uniforms.source == "own":

            def hidden_states(carried: np.ndarray) -> mx.array:
                with self._building:
                    return slot_pass(attached, layout, prefix, carried)

            targets = with_own_uniforms(
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

        def loss() -> LossParts:
            with checkpointed_layers(attached) if self._grad_checkpoint else nullcontext():
                hidden = slot_pass(attached, layout, prefix, targets.carried)
            batch = PTPBatch(
                hidden=hidden,
                label=mx.array(self._columns[targets.label]),
                weight=mx.array(targets.weight),
                greedy=mx.array(targets.greedy),
                teacher_row=mx.array(np.searchsorted(teacher.rows, layout.target).astype(np.int32)),
                teacher_logits=teacher.logits,
            )
            return self._loss(attached, batch)

        used = int(np.count_nonzero(targets.weight))  # the loss is a mean over these
        return used, *self._loss_and_gradients(loss)
