"""One training step of Parallel Token Prediction, and its acceptance on held-out text.

    examples -> layout -> pass 1 (base): KV, CDF edges of the text's tokens -> uniforms -> pass 2: slots that carry
    uniforms -> loss

Legend: S sequences, T padded length, N blocks per sequence, k rows of a block, M supervised rows, C draft columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp_mlx.drafters.ptp.config import PTPConfig
from mtp_mlx.drafters.ptp.loss import PTPBatch, PTPLoss
from mtp_mlx.drafters.ptp.own_uniforms import with_own_uniforms
from mtp_mlx.drafters.ptp.targets import UniformChoice, slot_targets
from mtp_mlx.drafters.ptp.uniforms import known_so_far, picker_of, teacher_rows, text_uniforms
from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.agreement import labelled_anchors
from mtp_mlx.drafters.slots.layout import build_layout
from mtp_mlx.drafters.slots.step import BlockChoice, draft_columns
from mtp_mlx.drafters.slots.two_pass import prefix_pass, slot_pass
from mtp_mlx.metal_kernels.inverse_cdf import inverse_cdf
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.agreement import Agreement
from mtp_mlx.train.data import Example
from mtp_mlx.train.grad_checkpoint import checkpointed_layers
from mtp_mlx.train.loss import LossParts
from mtp_mlx.train.step import MicroBatchRunner, Totals

# What the generators of a batch are seeded with besides (run, batch).
PLACES, GREEDY_BLOCKS, OWN_PLACES = 1, 2, 3


class PTPRunner(MicroBatchRunner):
    """Steps of a PTP adapter.

    Args:
        attached: a model with such an adapter.
        loss: of the slots.
        choice: which positions carry a block.
        uniforms: what slots carry.
        seed: of the run.
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
            self._evaluate_constants()

    def _evaluate_constants(self) -> None:
        """Evaluates every array the passes read: a lazy one belongs to the thread that made it."""
        layout = build_layout([[0, 0, 0]], [np.array([0], dtype=np.int32)], 1, 1, self._config.lead)
        prefix = prefix_pass(self._attached, layout)
        carried = np.full(layout.positions().shape, 0.5, dtype=np.float32)
        hidden = slot_pass(self._attached, layout, prefix, carried)
        mx.eval(self._trained.parameters(), self._attached.draft_head(hidden), self._attached.head(hidden))

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

            def latents(carried: np.ndarray) -> mx.array:
                with self._building:
                    return slot_pass(attached, layout, prefix, carried)

            targets = with_own_uniforms(
                attached,
                layout,
                targets,
                text,
                latents,
                self._picker,
                self._columns,
                choice.depth_decay,
                (self._seed, number, OWN_PLACES),
            )
        names: list[str] = []

        def loss() -> tuple[mx.array, ...]:
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
            result = self._loss(attached, batch)
            names[:] = list(result.parts)
            return (result.total, *result.parts.values())

        with self._building:
            parameters = self._trained.trainable_parameters()
            values, gradients = nn.value_and_grad(self._trained, loss)()
            self._trained.update(parameters)  # tracing leaves this thread's lazy copies in the module
        mx.eval(values, gradients)
        used = int(np.count_nonzero(targets.weight))  # the loss is a mean over these
        return used, LossParts(values[0], dict(zip(names, values[1:], strict=True))), gradients


def measure_ptp(
    attached: AttachedModel, batches: Iterable[Sequence[Example]], slots: int, most: int = 24, seed: int = 0
) -> Agreement:
    """Acceptance per depth, teacher-forced, with uniforms drawn evenly inside the intervals of the text's tokens.

    On text sampled as the adapter's teacher samples this is decoding's acceptance. Blocks with a token that the
    teacher cannot give are left out.
    """
    config: PTPConfig = adapter_of(attached).config
    picker = picker_of(config.teacher)
    accepted, submitted, blocks = np.zeros(slots), np.zeros(slots), 0
    random = np.random.default_rng(seed)
    for number, examples in enumerate(batches):
        anchors = labelled_anchors(examples, slots, most, random)
        if not any(len(own) for own in anchors):
            continue
        layout = build_layout(
            [example.tokens for example in examples], anchors, slots, min(most, 16), config.lead
        )
        prefix = prefix_pass(attached, layout)
        teacher = teacher_rows(attached, layout, prefix, picker, with_logits=False)
        text = text_uniforms(layout, teacher, 1.0, (seed, number, PLACES))
        nothing = np.full(layout.anchors.shape, picker.config.temperature == 0)
        targets = slot_targets(layout, teacher, text, config, nothing, 1.0)
        hidden = slot_pass(attached, layout, prefix, targets.carried)
        right = drafted_ids(attached, config, hidden, text.values.reshape(-1)[layout.target + 1])
        reachable = known_so_far(layout, text.reachable, own=True).reshape(-1, layout.slots).all(axis=1)
        right = (right == layout.label).reshape(-1, layout.slots)[reachable, config.lead :]
        alive = np.cumprod(right, axis=1)  # [blocks, k]
        accepted += alive.sum(axis=0)
        submitted += np.concatenate([np.ones((len(alive), 1)), alive[:, :-1]], axis=1).sum(axis=0)
        blocks += len(alive)
    return Agreement([float(a / s) if s else 0.0 for a, s in zip(accepted, submitted, strict=True)], blocks)


def drafted_ids(
    attached: AttachedModel, config: PTPConfig, hidden: mx.array, uniforms: np.ndarray
) -> np.ndarray:
    """Drafts as ids [M] of slot latents [M, D]; `uniforms` [M] are those of the tokens they predict."""
    logits = attached.draft_head(hidden)
    picker = picker_of(config.teacher)
    if config.variant == "o" or picker.config.temperature == 0:
        columns = mx.argmax(logits.astype(mx.float32), axis=-1)
    else:
        columns = inverse_cdf(picker.scores(logits), mx.array(uniforms))
    ids = attached.draft_ids
    return np.array(columns if ids is None else ids[columns])
