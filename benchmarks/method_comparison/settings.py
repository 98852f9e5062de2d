"""Options of the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from method_comparison.contestants import CONTESTANTS, Contestant
from mtp_mlx.config import setting
from mtp_mlx.errors import MTPError


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Options of the comparison; other training settings keep their defaults."""

    model: str = setting("smollm2-135m", help="Embedded model, mlx-lm folder or hub id", flag="-m")
    data: Path = setting(help="JSONL file to train all methods on", flag="-d")
    out: Path = setting(help="Output folder", flag="-o")
    only: tuple[str, ...] = setting((), help="Contestant to include; may be repeated (default: all)")
    steps: int | None = setting(None, help="Optimizer steps of each contestant", minimum=1)
    seconds: float | None = setting(
        None, help="Training time of each contestant, instead of --steps", minimum=1
    )
    slots: int = setting(4, help="Drafts per step", minimum=1)
    rank: int = setting(12, help="Rank of the LoRA", minimum=1)
    draft_vocab: int = setting(8192, help="Size of the draft vocabulary; 0 = all ids", minimum=0)
    batch_size: int = setting(2, help="Sequences per micro-batch", minimum=1)
    micro_batches: int = setting(2, help="Micro-batches per step", minimum=1)
    max_length: int = setting(1024, help="Sequence length in tokens; longer rows are truncated", minimum=8)
    block_share: float = setting(0.5, help="Fraction of positions that are supervised", minimum=0, maximum=1)
    cut_at_tokens: int = setting(0, help="Treat answers of this many tokens as truncated; 0 = off", minimum=0)
    learning_rate: float = setting(1e-3, help="Peak learning rate", minimum=0)
    warmup: int | None = setting(None, help="Steps of linear warm-up (default: as in training)", minimum=0)
    held_out: int = setting(32, help="Held-out rows", minimum=0)
    seed: int = setting(0, help="Seed of training and sampling", minimum=0)
    prompts: Path | None = setting(
        None, help="JSONL file of prompts to decode (default: built-in)", flag="-p"
    )
    limit: int | None = setting(None, help="Use this many prompts, spread over the file", minimum=1)
    max_tokens: int = setting(64, help="Tokens per prompt and per question", minimum=2, flag="-n")
    questions: Path | None = setting(None, help="JSONL file of questions for the sweep of tau", flag="-q")
    question_limit: int | None = setting(None, help="Use this many questions", minimum=1)
    tau: tuple[float, ...] = setting(
        (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995), help="Threshold; may be repeated"
    )

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise MTPError("give --steps or --seconds, and not both")
        known = [contestant.name for contestant in CONTESTANTS]
        for name in self.only:
            if name not in known:
                raise MTPError(f"unknown contestant '{name}': choose from {', '.join(known)}")

    @property
    def contestants(self) -> list[Contestant]:
        """The contestants that take part."""
        return [one for one in CONTESTANTS if not self.only or one.name in self.only]

    def folder(self, contestant: Contestant) -> Path:
        """The folder of the contestant's adapter."""
        return self.out / contestant.name
