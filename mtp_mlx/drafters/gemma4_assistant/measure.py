"""How often an assistant's drafts are right on what its model writes, and from which position more often."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import ChainPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.gemma4_assistant.config import POSITIONS
from mtp_mlx.drafters.gemma4_assistant.source import Gemma4Assistant
from mtp_mlx.model.attach import attach

CLEARLY = 0.1  # drafts a step by which another position must be better than that of the configuration


@dataclass(frozen=True)
class Measured:
    """What was counted.

    Attributes:
        acceptance: of each depth, given that the drafts before it were right; ends where no draft got that far.
        drafts: first drafts that were compared.
        precision: of the model's weights, in words.
    """

    acceptance: list[float]
    drafts: int
    precision: str

    @property
    def right(self) -> float:
        """Drafts of a step that are right."""
        return sum(accumulate(self.acceptance, mul))


def settle_position(
    model: nn.Module,
    source: Gemma4Assistant,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    tokens: int,
) -> dict[str, Measured]:
    """Lets drafts look back from the position from which they are right more often; what was measured from each.

    Args:
        model: bare.
        prompts: token ids of each prompt.
        ends: ids that end an answer.
        tokens: of each answer, at most.
    """
    own, found = source.config.position, {}
    for position in POSITIONS:
        source.look_from(position)
        found[position] = _measure(model, source, prompts, ends, tokens)
    best = max(found, key=lambda position: found[position].right)
    source.look_from(best if found[best].right > found[own].right + CLEARLY else own)
    return found


def _measure(
    model: nn.Module,
    source: Gemma4Assistant,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    tokens: int,
) -> Measured:
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
