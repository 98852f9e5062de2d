"""Options of the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from method_comparison.contestants import CONTESTANTS, Contestant
from mtp_mlx.config import setting
from mtp_mlx.errors import MTPError


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Options of the comparison; all other training settings keep their defaults."""

    model: str = setting("smollm2-135m", help="Embedded model, mlx-lm folder or hub id", flag="-m")
    data: Path = setting(help="JSONL that all are trained on", flag="-d")
    out: Path = setting(help="Folder that keeps everything", flag="-o")
    only: tuple[str, ...] = setting((), help="Only these contestants, may be repeated")
    steps: int | None = setting(None, help="Optimizer steps of each", minimum=1)
    seconds: float | None = setting(None, help="Instead of steps: training time of each", minimum=1)
    slots: int = setting(4, help="Drafts of a step", minimum=1)
    rank: int = setting(12, help="Rank of the LoRA", minimum=1)
    draft_vocab: int = setting(8192, help="Ids that may be drafted, 0 for all", minimum=0)
    batch_size: int = setting(2, help="Sequences per micro-batch", minimum=1)
    micro_batches: int = setting(2, help="Micro-batches per step", minimum=1)
    max_length: int = setting(1024, help="Longest sequence in tokens", minimum=8)
    block_share: float = setting(0.5, help="Share of positions that are supervised", minimum=0, maximum=1)
    cut_at_tokens: int = setting(0, help="Answers of this length were cut, 0 for none", minimum=0)
    learning_rate: float = setting(1e-3, help="Peak learning rate", minimum=0)
    warmup: int | None = setting(
        None, help="Steps of rising learning rate (default: training's own)", minimum=0
    )
    held_out: int = setting(32, help="Held-out rows of training", minimum=0)
    seed: int = setting(0, help="Seed of training and of sampled text", minimum=0)
    prompts: Path | None = setting(None, help="JSONL with prompt (or turns) to decode", flag="-p")
    limit: int | None = setting(None, help="At most this many prompts, spread over the file", minimum=1)
    max_tokens: int = setting(64, help="Tokens per prompt and per question", minimum=2, flag="-n")
    questions: Path | None = setting(None, help="JSONL of the tau sweep: question, answer", flag="-q")
    question_limit: int | None = setting(None, help="At most this many questions", minimum=1)
    tau: tuple[float, ...] = setting(
        (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995), help="Threshold, may be repeated"
    )

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise MTPError("say how long to train: give --steps or --seconds, not both")
        known = [contestant.name for contestant in CONTESTANTS]
        for name in self.only:
            if name not in known:
                raise MTPError(f"unknown contestant '{name}': choose from {', '.join(known)}")

    @property
    def contestants(self) -> list[Contestant]:
        """The contestants that take part."""
        return [one for one in CONTESTANTS if not self.only or one.name in self.only]

    def folder(self, contestant: Contestant) -> Path:
        """The folder of its adapter."""
        return self.out / contestant.name
