"""What becomes of drafts: verified by the model (the text stays the same), or emitted as they are (it may not).

Unverified emission is the decoding of arXiv 2602.06019: "static" emits every draft, "conf-adapt" the leading run
of tokens of which the model is sure. It is the one lossy rule of this package (design 2.3), never a default, and
every output it makes says `lossless: false`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.errors import MTPError

EmitName = Literal["verified", "conf-adapt", "static"]
EMIT_NAMES: tuple[EmitName, ...] = ("verified", "conf-adapt", "static")
DEFAULT_TAU = 0.9  # the paper's recommendation


@dataclass(frozen=True)
class Emission:
    """How tokens leave a step.

    Attributes:
        name: "verified" emits drafts that equal the model's own picks, "conf-adapt" the leading run of tokens
            whose probability is at least tau (one at least), "static" all of them.
        tau: threshold in (0, 1]. 1 means one token in every pass, which is plain decoding: a float32 probability
            can round to 1 without being certain. For "verified", how sure a draft must be to be submitted; None
            submits all. None is 0.9 for "conf-adapt".
        first_token_sampling: unverified emission only: where a pass emits one token, it is sampled as the sampling
            settings say; runs of several are always the likeliest tokens.

    Raises:
        MTPError: an unknown name, a tau out of range, or settings that contradict each other.
    """

    name: EmitName = "verified"
    tau: float | None = None
    first_token_sampling: bool = False

    def __post_init__(self) -> None:
        if self.name not in EMIT_NAMES:
            raise MTPError(f"unknown emission '{self.name}': choose one of {', '.join(EMIT_NAMES)}")
        if self.tau is not None and not 0 < self.tau <= 1:
            raise MTPError(f"tau is a probability, more than 0 and at most 1; got {self.tau}")
        if self.name == "static" and self.tau is not None:
            raise MTPError(
                "emission 'static' emits every draft and has no tau: drop it, or use --emit conf-adapt"
            )
        if self.name == "verified" and self.first_token_sampling:
            raise MTPError(
                "first-token sampling is for unverified emission: with --emit verified every token is sampled "
                "already, so drop it"
            )

    @property
    def lossless(self) -> bool:
        """The text is that of the model alone."""
        return self.name == "verified"

    @property
    def threshold(self) -> float | None:
        """Tau with its default; None where nothing is compared with one."""
        return DEFAULT_TAU if self.name == "conf-adapt" and self.tau is None else self.tau

    def label(self, layout: str) -> str:
        """How reports name a generation: the layout, or unverified emission; with tau where there is one."""
        if self.threshold is None:
            return layout if self.lossless else self.name
        chosen = "quadratic" if layout == "auto" else layout  # what a verified tau makes of "auto"
        return f"{chosen if self.lossless else self.name} tau {self.threshold:g}"

    def count(self, confidences: Sequence[float]) -> int:
        """Tokens an unverified step emits.

        Args:
            confidences: of the model's own pick, then of the drafts; at least one.
        """
        if self.threshold is None:
            return len(confidences)
        return max(1, sure_run(confidences, self.threshold))

    def greedy(self, sampling: SamplingConfig) -> SamplingConfig:
        """The settings with which unverified tokens are picked.

        Raises:
            MTPError: a temperature that nothing would use, or none where one is needed.
        """
        if sampling.temperature and not self.first_token_sampling:
            raise MTPError(
                f"emission '{self.name}' emits the likeliest tokens, so temperature {sampling.temperature:g} would "
                "do nothing: add --first-token-sampling, or use --emit verified or temperature 0"
            )
        if self.first_token_sampling and not sampling.temperature:
            raise MTPError("first-token sampling needs a temperature above 0: give --temp")
        return replace(sampling, temperature=0.0)


def sure_run(confidences: Sequence[float], tau: float) -> int:
    """Length of the leading run of confidences >= tau; 0 at tau 1 (see `Emission.tau`)."""
    if tau >= 1:
        return 0
    for index, confidence in enumerate(confidences):
        if not confidence >= tau:
            return index
    return len(confidences)
