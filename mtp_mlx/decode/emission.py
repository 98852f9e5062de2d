"""Whether drafts are verified by the model (the text stays the same) or emitted unverified (it may change).

Unverified emission is the decoding of arXiv 2602.06019: "static" emits every draft, "conf-adapt" the leading run of
confident tokens. It is the only lossy mode of this package, never a default, and all of its output is marked
`lossless: false`.
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
    """Which tokens of a step are emitted.

    Attributes:
        name: "verified" emits drafts that equal the model's own picks; "conf-adapt" the first token of a pass and the
            leading run of drafts with a probability of at least tau (arXiv 2602.06019); "static" every draft.
        tau: probability threshold in (0, 1], default 0.9 with "conf-adapt". With "verified", drafts less likely than
            tau are not submitted; None submits all of them. With 1 every pass gives one token, which is plain
            decoding: a float32 probability can round to 1 without being certain.
        first_token_sampling: unverified emission only: sample the token of a pass that emits just one; runs of
            several tokens are always greedy.

    Raises:
        MTPError: if the name is unknown, tau is out of range, or the settings contradict each other.
    """

    name: EmitName = "verified"
    tau: float | None = None
    first_token_sampling: bool = False

    def __post_init__(self) -> None:
        if self.name not in EMIT_NAMES:
            raise MTPError(f"unknown emission '{self.name}': choose one of {', '.join(EMIT_NAMES)}")
        if self.tau is not None and not 0 < self.tau <= 1:
            raise MTPError(f"`tau` must be above 0 and at most 1; got {self.tau}")
        if self.name == "static" and self.tau is not None:
            raise MTPError(
                "emission 'static' emits every draft and has no tau: leave `tau` out, or use emission 'conf-adapt'"
            )
        if self.name == "verified" and self.first_token_sampling:
            raise MTPError(
                "`first_token_sampling` is for unverified emission; with `emission` verified every token is sampled "
                "already: leave it out"
            )

    @property
    def lossless(self) -> bool:
        """Whether the text is exactly what the model alone would write."""
        return self.name == "verified"

    @property
    def threshold(self) -> float | None:
        """`tau` or its default; None if no threshold applies."""
        return DEFAULT_TAU if self.name == "conf-adapt" and self.tau is None else self.tau

    def label(self, layout: str) -> str:
        """The name of a generation in reports: its layout or unverified emission, and tau if there is one."""
        name = layout if self.lossless else self.name
        return name if self.threshold is None else f"{name} tau {self.threshold:g}"

    def count(self, confidences: Sequence[float], own_pick: bool = False) -> int:
        """How many tokens an unverified step emits.

        The paper asks tau of a pass's first token too, which its fine-tuned model predicts like the others. Where the
        first token is the base model's own pick, as behind gated slots, it is what the base would write however sure
        it is, and tau is asked of the drafts only.

        Args:
            confidences: of the first token, then of the drafts; at least one.
            own_pick: whether the first token is the base model's own pick.
        """
        if self.threshold is None:
            return len(confidences)
        if own_pick:
            return 1 + sure_run(confidences[1:], self.threshold)
        return max(1, sure_run(confidences, self.threshold))

    def greedy(self, sampling: SamplingConfig) -> SamplingConfig:
        """The sampling settings for unverified tokens.

        Raises:
            MTPError: if a temperature is given that would have no effect, or none where one is needed.
        """
        if sampling.temperature and not self.first_token_sampling:
            raise MTPError(
                f"emission '{self.name}' emits the likeliest tokens, so temperature {sampling.temperature:g} would "
                "have no effect: add `first_token_sampling`, or use `emission` verified or `temperature` 0"
            )
        if self.first_token_sampling and not sampling.temperature:
            raise MTPError("`first_token_sampling` needs a `temperature` above 0")
        return replace(sampling, temperature=0.0)


def sure_run(confidences: Sequence[float], tau: float) -> int:
    """Length of the leading run of confidences >= tau; 0 if tau is 1 (see `Emission.tau`)."""
    if tau >= 1:
        return 0
    for index, confidence in enumerate(confidences):
        if not confidence >= tau:
            return index
    return len(confidences)
