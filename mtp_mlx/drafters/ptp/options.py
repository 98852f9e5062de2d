"""Training settings of Parallel Token Prediction; needs no mlx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mtp_mlx.config import setting
from mtp_mlx.drafters.slots.options import BlockSettings
from mtp_mlx.train.settings import Trains

DEFAULT_BETA = 0.3


@dataclass(frozen=True, kw_only=True)
class PTPSettings(BlockSettings):
    """Settings of Parallel Token Prediction (arXiv 2512.21323)."""

    method: ClassVar[str] = "ptp"

    variant: Literal["o", "c"] = setting(
        "o", help="o: slots predict the sampled token (O-PTP), c: its distribution (C-PTP)"
    )
    u_embedding: Literal["bits", "linear-interpolation", "sawtooth", "ieee-bits"] = setting(
        "bits", help="Embedding of the uniforms"
    )
    u_beta: float = setting(
        DEFAULT_BETA,
        help="Training uniforms are Beta(b, b) within a token's CDF interval; 1 = uniform",
        minimum=0.01,
    )
    uniforms: Literal["teacher", "own"] = setting(
        "teacher",
        help="Source of the training uniforms: the teacher's CDF or the model's own (variant c only)",
    )
    independent: bool = setting(False, help="Ablation: slots without uniforms")
    ptp_loss: Literal["ce", "kl", "reverse-kl"] = setting(
        "ce", help="Loss; kl and reverse-kl for variant c only"
    )
    greedy_share: float = setting(
        0.0, help="Fraction of blocks trained for temperature 0", minimum=0.0, maximum=1.0
    )
    teacher_temperature: float = setting(
        1.0, help="Temperature at which the training text was sampled", minimum=0.0
    )
    teacher_top_k: int = setting(0, help="Top-k with which it was sampled; 0 = off", minimum=0)
    teacher_top_p: float = setting(
        1.0, help="Top-p with which it was sampled; 1 = off", minimum=0.0, maximum=1.0
    )
    teacher_min_p: float = setting(
        0.0, help="Min-p with which it was sampled; 0 = off", minimum=0.0, maximum=1.0
    )

    def default_draft_vocab(self) -> int | None:
        """See `TrainSettings`."""
        return 0 if self.variant == "c" else super().default_draft_vocab()

    def problems(self) -> list[str]:
        """See `TrainSettings`."""
        problems = super().problems()
        if self.variant == "c" and self.draft_vocab:
            problems.append(
                "`variant` c picks by the distribution over all ids, whose edges a draft vocabulary would shift: set "
                "`draft_vocab` to 0"
            )
        if self.variant == "o" and self.ptp_loss != "ce":
            problems.append(
                f"`ptp_loss` {self.ptp_loss} compares distributions, and `variant` o predicts tokens"
            )
        if self.uniforms == "own":
            problems += self._problems_of_own_uniforms()
        return problems

    def _problems_of_own_uniforms(self) -> list[str]:
        """Contradictions with inverse-autoregressive training."""
        problems = []
        if self.variant == "o":
            problems.append("`uniforms` own needs a distribution per slot, and `variant` o predicts tokens")
        if self.ptp_loss != "ce":
            problems.append(f"`uniforms` own has no teacher, and `ptp_loss` {self.ptp_loss} needs one")
        if self.u_beta != DEFAULT_BETA:
            problems.append("`uniforms` own draws uniforms evenly: leave `u_beta` out")
        if self.independent:
            problems.append("`independent` slots have no uniforms: leave `uniforms` out")
        return problems


TRAINS = {
    "ptp": Trains(
        PTPSettings,
        "method:TrainPTP",
        help="Parallel Token Prediction: slots that share the sampler's noise (arXiv 2512.21323)",
        examples=(
            "mtp-mlx train ptp --data sampled.jsonl --out ptp --teacher-temperature 0.7 --greedy-share 0.3",
            "mtp-mlx train ptp --data sampled.jsonl --out c-ptp --variant c --ptp-loss kl",
        ),
    ),
}
