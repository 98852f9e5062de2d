"""Training settings that the methods of slots share; needs no mlx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtp_mlx.config import setting
from mtp_mlx.train.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class SlotSettings(TrainSettings):
    """What every method reads that trains slots with LoRA."""

    slots: int = setting(4, help="Slots per block, each of which predicts one token", minimum=1, maximum=32)
    rank: int = setting(12, help="Rank of the LoRA", minimum=1)
    alpha: float = setting(24.0, help="LoRA scale: the update is multiplied by alpha / rank")
    target_modules: tuple[str, ...] = setting(
        (), help="Names of the linear layers with LoRA (default: all); may be repeated"
    )
    learn_from: Literal["responses", "all"] = setting(
        "responses", help="Learn from responses only, or from prompts too"
    )
    chunk_blocks: int = setting(16, help="Blocks that share a copy of the prefix, at most", minimum=1)
    grad_checkpoint: bool | None = setting(
        None, help="Recompute layers in the backward pass (default: if memory is short)"
    )

    def problems(self) -> list[str]:
        """See `TrainSettings`."""
        problems = super().problems()
        if self.max_length < self.slots + 2:
            problems.append(
                f"`max_length` {self.max_length} is too short for a block of {self.slots} slots, "
                f"which takes {self.slots + 2} tokens"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class BlockSettings(SlotSettings):
    """What the methods read that train a block of slots behind every position, or behind a random share of them."""

    block_share: float | None = setting(
        None,
        help="Fraction of positions with a block of slots (default: 4,096 slots a step)",
        minimum=0.0,
        maximum=1.0,
    )
    block_lengths: Literal["fixed", "random"] = setting(
        "fixed", help="Slots per block: all of them, or a random number from 1 on"
    )
    max_blocks: int = setting(0, help="Maximum number of blocks per sequence; 0 = no limit", minimum=0)
    depth_decay: float = setting(1.0, help="Loss weight of slot j: this to the power j - 1", minimum=0.0)

    def problems(self) -> list[str]:
        """See `TrainSettings`."""
        problems = super().problems()
        if self.block_share == 0:
            problems.append("`block_share` 0 leaves no block to train on")
        return problems
