"""Inverse-autoregressive training of C-PTP: from data alone, without a teacher (arXiv 2512.21323, section 3).

    for k = i .. N:  P_k = P(. | t_<i, u_i .. u_{k-1});  u_k evenly inside the interval of P_k's CDF that picks t_k
    loss = - sum_k log P_k(t_k)

The uniforms come from the model itself, one slot after another; then one joint pass over real rows and slots has the
loss. The whole model is trained, so real rows change too: they are slot 0 of every block (k = i), ordinary next-token
prediction. There is no base to fall back on and nothing is verified; a trained model is sampled with any number of
slots a call, and its text follows its own slots' distribution.

Legend: B texts, T tokens each, N blocks, k slots behind a real row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp_mlx.drafters.ptp.uniform_embedding import FIXED_POINT_BITS
from mtp_mlx.drafters.ptp.weights import PTPAdapter
from mtp_mlx.metal_kernels.inverse_cdf import interval
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block

GRID = 2.0**FIXED_POINT_BITS


@dataclass(frozen=True)
class JointLayout:
    """Real rows of equally long texts, then blocks of slots behind some of them, the same in every text.

    Attributes:
        length: T real rows.
        anchors: [N] real rows that carry a block; row `anchor + slots + 1` must exist.
        slots: k.
    """

    length: int
    anchors: np.ndarray
    slots: int

    def __post_init__(self) -> None:
        if len(self.anchors) == 0 or self.anchors.max() + self.slots + 1 >= self.length:
            raise ValueError(
                f"blocks of {self.slots} slots behind rows {self.anchors.tolist()} do not fit {self.length} tokens"
            )

    @property
    def slot_positions(self) -> np.ndarray:
        """[N * k] int32 where slots stand: slot j (from 1) behind anchor a at a + j; it predicts a + j + 1."""
        return (self.anchors[:, None] + np.arange(1, self.slots + 1)).reshape(-1).astype(np.int32)

    def positions(self) -> np.ndarray:
        """[T + N * k] int32."""
        return np.concatenate([np.arange(self.length, dtype=np.int32), self.slot_positions])

    def visibility(self) -> np.ndarray:
        """[T + N * k] squared, bool: real rows are causal; slots see real rows to the anchor, own slots to itself."""
        count, rows = len(self.anchors), self.length + len(self.anchors) * self.slots
        sees = np.zeros((rows, rows), dtype=bool)
        sees[: self.length, : self.length] = np.tril(np.ones((self.length, self.length), dtype=bool))
        prefix = np.arange(self.length)[None] <= self.anchors[:, None]
        sees[self.length :, : self.length] = np.repeat(prefix, self.slots, axis=0)
        causal = np.tril(np.ones((self.slots, self.slots), dtype=bool))
        sees[self.length :, self.length :] = np.kron(np.eye(count, dtype=bool), causal)
        return sees


def joint_logits(
    attached: AttachedModel, layout: JointLayout, tokens: mx.array, uniforms: mx.array
) -> mx.array:
    """Logits of one joint pass, [B, T + N * k, V]; differentiable in everything.

    Args:
        tokens: [B, T] int32.
        uniforms: [B, N * k] float32, what slots carry.
    """
    slot_ids = mx.full((tokens.shape[0], uniforms.shape[1]), attached.vocab_size, dtype=mx.int32)
    block = Block(
        ids=mx.concatenate([tokens, slot_ids], axis=1),
        n_real=layout.length,
        positions=mx.array(layout.positions()),
        visibility=mx.array(layout.visibility()),
        uniforms=uniforms,
    )
    return attached.head(attached.forward(block, attached.make_cache()))


def own_uniforms(
    attached: AttachedModel, layout: JointLayout, tokens: np.ndarray, seed: Sequence[int]
) -> np.ndarray:
    """Uniforms that pick the text's tokens under the model's own distributions, one slot after another, [B, N * k].

    Slot j carries the uniform of the token where it stands, which the row before it predicts: the anchor for the
    first slot, the slot before for the others. k passes without gradients.

    Args:
        tokens: [B, T] int32.
        seed: of NumPy's generator; the same seed gives the same places inside the intervals.
    """
    batch, blocks, slots = tokens.shape[0], len(layout.anchors), layout.slots
    place = np.random.default_rng(tuple(seed)).random((batch, blocks, slots))
    uniforms = np.zeros((batch, blocks, slots), dtype=np.float32)
    ids = mx.array(tokens)
    for slot in range(slots):
        logits = joint_logits(attached, layout, ids, mx.array(uniforms.reshape(batch, -1)))
        before = layout.anchors if slot == 0 else layout.length + np.arange(blocks) * slots + slot - 1
        rows = logits[:, mx.array(before)].reshape(batch * blocks, -1)
        label = tokens[:, layout.anchors + slot + 1].reshape(-1)
        left, right = (
            np.array(edge).astype(np.float64).reshape(batch, blocks)
            for edge in interval(rows, mx.array(label))
        )
        drawn = np.floor((left + (right - left) * place[:, :, slot]) * GRID)
        uniforms[:, :, slot] = np.clip(np.maximum(drawn, np.ceil(left * GRID)), 0, GRID - 1) / GRID
    return uniforms.reshape(batch, -1)


def inverse_ar_losses(
    attached: AttachedModel, layout: JointLayout, tokens: mx.array, uniforms: mx.array
) -> tuple[mx.array, mx.array]:
    """-log P of the text's tokens: of real rows [B, T - 1], and of slots [B, N * k]."""
    logits = joint_logits(attached, layout, tokens, uniforms).astype(mx.float32)
    real = nn.losses.cross_entropy(logits[:, : layout.length - 1], tokens[:, 1:])
    label = tokens[:, mx.array(layout.slot_positions + 1)]
    return real, nn.losses.cross_entropy(logits[:, layout.length :], label)


class InverseAR:
    """Loss and gradients of steps.

    Args:
        attached: an unfrozen model with a PTP adapter of variant "c", both trained.
        slots: k behind every anchor.
        anchors: N blocks drawn in each step.
        seed: of the run; what a step draws is a function of (seed, step).

    Raises:
        ValueError: the adapter is of another kind.
    """

    def __init__(self, attached: AttachedModel, slots: int, anchors: int, seed: int = 0) -> None:
        if not isinstance(attached.speculator, PTPAdapter) or attached.speculator.config.variant != "c":
            raise ValueError("inverse-autoregressive training is for PTP adapters of variant 'c'")
        self.attached, self.slots, self.anchors, self._seed = attached, slots, anchors, seed

    def layout(self, length: int, step: int) -> JointLayout:
        """The blocks of a step over texts of `length` tokens."""
        last = length - self.slots - 1
        drawn = np.random.default_rng((self._seed, step, 0)).permutation(last)[: self.anchors]
        return JointLayout(length, np.sort(drawn), self.slots)

    def __call__(self, tokens: np.ndarray, step: int) -> tuple[mx.array, dict]:
        """(mean loss over all rows, gradients of the attached model's trainable parameters).

        The attached model shows the adapter's weights as its own. tokens: [B, T] int32.
        """
        layout = self.layout(tokens.shape[1], step)
        uniforms = mx.array(own_uniforms(self.attached, layout, tokens, (self._seed, step, 1)))

        def loss() -> mx.array:
            real, slots = inverse_ar_losses(self.attached, layout, mx.array(tokens), uniforms)
            return (mx.sum(real) + mx.sum(slots)) / (real.size + slots.size)

        return nn.value_and_grad(self.attached.model, loss)()

    def perplexity(self, tokens: np.ndarray, seed: int = 0) -> float:
        """Of the text's tokens behind the anchors under the slots, with evenly drawn uniforms. tokens: [B, T]."""
        layout = self.layout(tokens.shape[1], 2**31 + seed)
        uniforms = mx.array(own_uniforms(self.attached, layout, tokens, (self._seed, 2**31 + seed, 1)))
        _, slots = inverse_ar_losses(self.attached, layout, mx.array(tokens), uniforms)
        return float(np.exp(np.mean(np.array(slots))))
