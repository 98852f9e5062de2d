"""How often an assistant's drafts are right, on what its model writes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import ChainPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.gemma4_assistant.source import Gemma4Assistant
from mtp_mlx.model.attach import attach


class Measured(NamedTuple):
    """What was counted.

    Attributes:
        acceptance: of each depth, given that the drafts before it were right; ends where no draft got that far.
        drafts: first drafts that were compared.
        precision: of the model's weights, in words.
    """

    acceptance: list[float]
    drafts: int
    precision: str


def measure(
    model: nn.Module,
    source: Gemma4Assistant,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    tokens: int,
) -> Measured:
    """Decodes greedily on the bare model `model`, with the assistant.

    Args:
        prompts: token ids of each prompt.
        ends: ids that end an answer.
        tokens: of each answer, at most.
    """
    stats = DecodeStats()
    attached = attach(model, source)
    source.set_dtype(attached.embed(mx.zeros((1,), dtype=mx.int32)).dtype)  # as `load` does
    try:
        for prompt in prompts:
            policy = ChainPolicy(source.drafts)
            steps = mtp_generate_step(prompt, attached, max_tokens=tokens, policy=policy, stats=stats)
            for found in steps:
                if found.token in ends:
                    break
            steps.close()
    finally:
        attached.detach()
    acceptance = [value for value in stats.acceptance if value is not None]
    return Measured(acceptance, stats.submitted[0] if acceptance else 0, attached.precision)
