"""The likely tokens of every slot, so that the sampler head need not score the whole draft vocabulary again.

The sampler head adds to a slot's hidden state what the token before calls for. The token that is then likeliest is
nearly always among the likeliest without it. So one product of all slots with the draft vocabulary finds the tokens
in question, and the sampler head scores these alone, with a few rows of the LM head. Now and then the draft is not
the one that the whole vocabulary would give; as every draft is verified, the text is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.decode.pick import Picker
from mtp_mlx.model.block_linear import is_quantised
from mtp_mlx.model.head import Vocabulary

TOKENS = 256  # of a slot's shortlist
WORTH = 16  # times as many tokens must be in the draft vocabulary, or it is scored as a whole


@dataclass(frozen=True)
class Shortlist:
    """Tokens of the slots k of a group.

    Attributes:
        ids: [k, N] int32.
        rows: [k, N, D] their rows of the LM head.
        shares: [k] probability of these tokens together, before the sampler head.
    """

    ids: mx.array
    rows: mx.array
    shares: mx.array

    def logits(self, slot: int, refined: mx.array) -> mx.array:
        """[P, N] of the slot's tokens, for inputs of the LM head [P, D]."""
        return refined @ self.rows[slot].T


def layer_of_shortlists(whole: Vocabulary, vocabulary: Vocabulary, picker: Picker) -> nn.Module | None:
    """The LM head's layer whose rows shortlists take; None if drafts need all logits.

    They do if the model scales or caps its logits, if the draft vocabulary is small, or if tokens are sampled by the
    inverse CDF, in which every token counts.

    Args:
        whole: the model's vocabulary.
        vocabulary: that of the drafts.
        picker: picks the drafts.
    """
    config = picker.config
    if config.temperature and config.noise == "inverse-cdf" or vocabulary.head.columns < WORTH * TOKENS:
        return None
    return whole.head.matrix


def shortlist(
    latents: mx.array,
    positions: mx.array,
    history: mx.array | None,
    layer: nn.Module,
    vocabulary: Vocabulary,
    picker: Picker,
) -> Shortlist:
    """The shortlists of slots, lazily.

    Args:
        latents: [k, D] hidden states of the slots.
        positions: [k] int32 positions of their drafts.
        history: [C] int32 tokens before the first of them, or None without penalties.
        layer: from `layer_of_shortlists`.
        vocabulary: that of the drafts.
        picker: with its noise, so that at a temperature the tokens are those that the noise favours.
    """
    logits = vocabulary.head(latents[None])[0]  # [k, V]
    histories = None if history is None else mx.broadcast_to(history, (latents.shape[0], *history.shape))
    ids, chances = picker.candidates(logits, positions, histories, vocabulary.ids, TOKENS)
    return Shortlist(ids, _rows(layer, ids), chances.sum(axis=-1))


def _rows(layer: nn.Module, ids: mx.array) -> mx.array:
    """[..., D] the rows `ids` of a linear layer or an embedding, quantised or not."""
    weight: mx.array = layer.weight[ids]
    if not is_quantised(layer):
        return weight
    biases = layer.get("biases")
    return mx.dequantize(
        weight,
        layer.scales[ids],
        None if biases is None else biases[ids],
        group_size=layer.group_size,
        bits=layer.bits,
        mode=getattr(layer, "mode", "affine"),
    )
