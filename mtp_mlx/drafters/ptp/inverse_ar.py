"""Inverse-autoregressive training of C-PTP on data alone, without a teacher (arXiv 2512.21323, section 3).

    for k = i .. N:  P_k = P(. | t_<i, u_i .. u_{k-1});  u_k uniform in the interval of P_k's CDF that picks t_k
    loss = - sum_k log P_k(t_k)

The model itself provides the uniforms, one slot after another; then the loss is that of one joint pass over real rows
and slots. The whole model is trained, so real rows change too: they are slot 0 of every block (k = i), ordinary
next-token prediction. Nothing is verified. A trained model can be sampled with any number of slots per call, and its
text follows the distribution of its slots.

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
from mtp_mlx.errors import MTPError
from mtp_mlx.metal_kernels.inverse_cdf import interval
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block

GRID = 2.0**FIXED_POINT_BITS


@dataclass(frozen=True)
class JointLayout:
    """Real rows of texts of the same length, followed by blocks of slots, the same in every text.

    Attributes:
        length: T real rows.
        anchors: [N] real rows with a block of slots behind them; `anchor + slots + 1` must be a real row.
        slots: k.

    Raises:
        ValueError: a block does not fit.
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
        """Positions of the slots, int32 [N * k]: slot j, from 1, behind anchor a has a + j and predicts a + j + 1."""
        return (self.anchors[:, None] + np.arange(1, self.slots + 1)).reshape(-1).astype(np.int32)

    def positions(self) -> np.ndarray:
        """Positions of all rows, int32 [T + N * k]."""
        return np.concatenate([np.arange(self.length, dtype=np.int32), self.slot_positions])

    def visibility(self) -> np.ndarray:
        """bool [T + N * k] squared: real rows are causal; a slot sees rows to its anchor, and its block to itself."""
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
        uniforms: [B, N * k] float32, what the slots carry.
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
    """Uniforms that pick the text's tokens under the model's own distributions, float32 [B, N * k].

    A slot carries the uniform of the token at its position, which the row before it predicts: the anchor for the
    first slot, the previous slot for the others. Takes k passes without gradients, one after another.

    Args:
        tokens: [B, T] int32.
        seed: of NumPy's generator.
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
    """-log P of the text's tokens: under real rows [B, T - 1], and under slots [B, N * k]."""
    logits = joint_logits(attached, layout, tokens, uniforms).astype(mx.float32)
    real = nn.losses.cross_entropy(logits[:, : layout.length - 1], tokens[:, 1:])
    label = tokens[:, mx.array(layout.slot_positions + 1)]
    return real, nn.losses.cross_entropy(logits[:, layout.length :], label)


class InverseAR:
    """Computes loss and gradients of steps.

    Args:
        attached: an unfrozen model with a PTP adapter of variant "c"; both are trained.
        slots: k, slots behind every anchor.
        anchors: N, blocks per step.
        seed: of the run; random numbers are functions of (seed, step).

    Raises:
        ValueError: the adapter is not of variant "c".
        MTPError: the model has recurrent state.
    """

    def __init__(self, attached: AttachedModel, slots: int, anchors: int, seed: int = 0) -> None:
        if not isinstance(attached.speculator, PTPAdapter) or attached.speculator.config.variant != "c":
            raise ValueError("inverse-autoregressive training is for PTP adapters of variant 'c'")
        if attached.why_linear:
            raise MTPError(
                f"inverse-autoregressive training runs real rows and slots in one pass, and {attached.why_linear}, "
                "slots too: train a PTP adapter with own uniforms instead"
            )
        self.attached, self.slots, self.anchors, self._seed = attached, slots, anchors, seed

    def layout(self, length: int, step: int) -> JointLayout:
        """The layout of a step over texts of `length` tokens."""
        last = length - self.slots - 1
        drawn = np.random.default_rng((self._seed, step, 0)).permutation(last)[: self.anchors]
        return JointLayout(length, np.sort(drawn), self.slots)

    def __call__(self, tokens: np.ndarray, step: int) -> tuple[mx.array, dict]:
        """(mean loss over all rows, gradients of model and adapter) of a step.

        Args:
            tokens: [B, T] int32.
            step: number of the step.
        """
        layout = self.layout(tokens.shape[1], step)
        uniforms = mx.array(own_uniforms(self.attached, layout, tokens, (self._seed, step, 1)))

        def loss() -> mx.array:
            real, slots = inverse_ar_losses(self.attached, layout, mx.array(tokens), uniforms)
            return (mx.sum(real) + mx.sum(slots)) / (real.size + slots.size)

        return nn.value_and_grad(self.attached.model, loss)()

    def perplexity(self, tokens: np.ndarray, seed: int = 0) -> float:
        """Perplexity of the tokens behind the anchors, under the slots; `tokens` [B, T] int32."""
        layout = self.layout(tokens.shape[1], 2**31 + seed)
        uniforms = mx.array(own_uniforms(self.attached, layout, tokens, (self._seed, 2**31 + seed, 1)))
        _, slots = inverse_ar_losses(self.attached, layout, mx.array(tokens), uniforms)
        return float(np.exp(np.mean(np.array(slots))))
