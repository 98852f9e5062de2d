"""Settings that every training method reads. What a method reads besides stands in its room's `options.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mtp_mlx.config import setting, trust_setting
from mtp_mlx.errors import MTPError
from mtp_mlx.models import named_adapter

DEFAULT_WARMUP = 50
DEFAULT_DRAFT_VOCAB = 8192
SEQUENCES = 4  # of a step, by default


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What every training method reads. A method's own settings extend this class.

    `mtp_mlx.drafters.registry.settings_class("mask-tokens")` gives the class of a method.

    Attributes:
        method: name of the training method, as in `mtp-mlx train METHOD`.

    Raises:
        MTPError: settings contradict each other; the message lists all contradictions.
    """

    method: ClassVar[str]

    model: str = setting("smollm2-135m", help="Base model: smollm2-135m, a folder or a hub id", flag="-m")
    trust_remote_code: bool = trust_setting()
    data: Path = setting(help="JSONL file, or folder with train.jsonl and valid.jsonl", flag="-d")
    out: Path = setting(help="Adapter folder to write; its checkpoint lies beside it", flag="-o")
    start_from: Path | None = setting(None, help="Adapter folder to start from")
    draft_vocab: int | None = setting(
        None,
        help="Size of the draft vocabulary, the data's most frequent ids; 0 = all ids (default: 8192, or what "
        "the method needs)",
        minimum=0,
    )

    steps: int = setting(1000, help="Optimizer steps", minimum=1)
    batch_size: int = setting(2, help="Sequences per micro-batch", minimum=1)
    micro_batches: int = setting(
        0, help="Micro-batches per step; 0 = as many as make 4 sequences, at least 2", minimum=0
    )
    memory: str | None = setting(
        None, help="Memory to use, as in 12GB (default: what Metal recommends, or 60 %)"
    )
    max_length: int = setting(1024, help="Sequence length in tokens; longer rows are truncated", minimum=8)
    cut_at_tokens: int = setting(
        0,
        help="Treat answers of this many tokens or more as truncated, with no end of turn; 0 = off",
        minimum=0,
    )

    learning_rate: float = setting(1e-3, help="Peak learning rate", minimum=0.0)
    warmup: int | None = setting(
        None, help="Steps of linear warm-up (default: 50, at most half of the run)", minimum=0
    )
    schedule: Literal["constant", "cosine", "linear"] = setting("cosine", help="Decay after the warm-up")
    final_rate: float = setting(
        0.05, help="Final learning rate, as a fraction of the peak", minimum=0.0, maximum=1.0
    )
    ema: float = setting(
        0.0, help="Decay of the average of the weights that is exported; 0 = off", minimum=0.0, maximum=1.0
    )
    weight_decay: float = setting(0.0, help="AdamW weight decay", minimum=0.0)
    clip: float = setting(1.0, help="Clip the gradient norm at this value; 0 = off", minimum=0.0)
    loss_rows: int = setting(2048, help="Rows per chunk of the loss, whose logits are in memory", minimum=1)

    held_out: int | None = setting(
        None, help="Held-out rows on which acceptance is measured (default: min(32, 10 %))", minimum=0
    )
    measure_every: int = setting(100, help="Steps between measurements; 0 = only at the end", minimum=0)
    save_every: int = setting(50, help="Steps between checkpoints", minimum=1)
    seed: int = setting(0, help="Seed of initial weights, data order and sampled positions", minimum=0)

    def __post_init__(self) -> None:
        """Fills in the folder of a named adapter and missing defaults, and refuses contradictions."""
        if self.start_from is not None:
            object.__setattr__(self, "start_from", named_adapter(self.start_from))
        if self.draft_vocab is None:
            object.__setattr__(self, "draft_vocab", self.default_draft_vocab())
        if not self.micro_batches:
            object.__setattr__(self, "micro_batches", max(2, SEQUENCES // self.batch_size))
        if self.warmup is None:
            object.__setattr__(self, "warmup", min(DEFAULT_WARMUP, self.steps // 2))
        problems = self.problems()
        if problems:
            raise MTPError(f"these settings do not go together: {'; '.join(problems)}")

    def default_draft_vocab(self) -> int | None:
        """Size of the draft vocabulary unless one is given; 0 for all ids, None for that of `start_from`."""
        return DEFAULT_DRAFT_VOCAB

    def problems(self) -> list[str]:
        """Contradictions between settings, a clause each; subclasses add those of their own fields."""
        problems = []
        if self.warmup is not None and self.warmup > self.steps:
            problems.append(f"`warmup` ({self.warmup}) is longer than the run (`steps` {self.steps})")
        if self.ema == 1:
            problems.append("`ema` 1 keeps the initial weights: give a decay below 1, such as 0.999")
        if self.learning_rate == 0:
            problems.append("`learning_rate` 0 trains nothing")
        return problems


@dataclass(frozen=True)
class Trains:
    """A training method as its room's `options.py` declares it; needs no mlx.

    Attributes:
        settings: class of its settings.
        method: its `mtp_mlx.train.method.Method`, as "module:Class" of the room.
        help: what it trains, in one line.
        examples: command lines, shown by `mtp-mlx train METHOD --help`.
    """

    settings: type[TrainSettings]
    method: str
    help: str
    examples: tuple[str, ...]
