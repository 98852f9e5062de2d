"""Training settings of mask tokens, and which methods train them; needs no mlx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mtp_mlx.config import setting
from mtp_mlx.drafters.slots.options import BlockSettings, SlotSettings
from mtp_mlx.train.settings import Trains


@dataclass(frozen=True, kw_only=True)
class MaskTokenSettings(BlockSettings):
    """Settings of gated-LoRA mask tokens (arXiv 2507.11851)."""

    method: ClassVar[str] = "mask-tokens"

    objective: Literal["self-distill", "apple"] = setting(
        "self-distill", help="Train on the base model's distributions, or on the text with the paper's loss"
    )
    sampler_width: int = setting(1024, help="Hidden size of the sampler head", minimum=1)
    sampler_rate: float = setting(
        0.3, help="Learning rate of the sampler head, as a fraction of the rate", minimum=0.0
    )
    lcm_weight: float | None = setting(
        None, help="Weight of latent consistency matching (default: apple 1, else 0)", minimum=0.0
    )


@dataclass(frozen=True, kw_only=True)
class ConfAdaptSettings(SlotSettings):
    """Settings of the self-distilled mask token (arXiv 2602.06019)."""

    method: ClassVar[str] = "conf-adapt"

    tuning: Literal["gated-lora", "lora", "full"] = setting(
        "gated-lora", help="What is trained: LoRA on slots only, LoRA on all rows, or the whole model"
    )
    supervision: Literal["hard-teacher", "soft-teacher", "ground-truth"] = setting(
        "hard-teacher", help="Target: the teacher's argmax, the teacher's distribution, or the text"
    )
    region_rows: int = setting(
        0, help="Rows of a region, real tokens and masks; 0 = twice the tokens it predicts", minimum=0
    )

    def __post_init__(self) -> None:
        """Fills in the default of `region_rows`: the paper has 32 rows for up to 16 tokens, of which 15 are masks."""
        if not self.region_rows:
            object.__setattr__(self, "region_rows", 2 * (self.slots + 1))
        super().__post_init__()

    def default_draft_vocab(self) -> int | None:
        """See `TrainSettings`."""
        return super().default_draft_vocab() if self.tuning == "gated-lora" else 0

    def problems(self) -> list[str]:
        """See `TrainSettings`."""
        problems = super().problems()
        if self.region_rows < self.slots + 2:
            problems.append(
                f"`region_rows` {self.region_rows} has no room for {self.slots} masks behind two tokens; "
                f"{self.slots + 2} does"
            )
        if self.tuning != "gated-lora" and self.draft_vocab:
            problems.append(
                f"`tuning` {self.tuning} trains the model's own predictions, which have the whole vocabulary: "
                "set `draft_vocab` to 0"
            )
        if self.tuning != "gated-lora" and self.start_from is not None:
            problems.append(
                f"`start_from` continues adapters, and `tuning` {self.tuning} writes whole models: give that model "
                "as `model` instead"
            )
        return problems


TRAINS = {
    "mask-tokens": Trains(
        MaskTokenSettings,
        "method:MaskTokens",
        help="Mask tokens: gated LoRA and a sampler head (arXiv 2507.11851)",
        examples=(
            "mtp-mlx train mask-tokens --data answers.jsonl --out adapter",
            "mtp-mlx train mask-tokens --data answers.jsonl --out adapter8 --slots 8 --block-lengths random",
        ),
    ),
    "conf-adapt": Trains(
        ConfAdaptSettings,
        "conf_adapt:ConfAdapt",
        help="One mask token, by online self-distillation (arXiv 2602.06019)",
        examples=("mtp-mlx train conf-adapt --data answers.jsonl --out adapter --draft-vocab 0",),
    ),
}
