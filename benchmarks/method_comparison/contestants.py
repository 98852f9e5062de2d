"""The methods that are compared, and the temperatures they are measured at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SAMPLED = 0.7  # measured besides 0; PTP is trained on its uniforms


@dataclass(frozen=True)
class Contestant:
    """One trained method.

    Attributes:
        name: also of its folder.
        title: of its row in the table.
        settings: arguments of `TrainSettings`, besides those that all have in common.
    """

    name: str
    title: str
    settings: dict[str, Any]

    @property
    def noise(self) -> str:
        """How its text is sampled: drafters use the target's noise."""
        return "inverse-cdf" if self.settings["method"] == "ptp" else "gumbel"


# Half of the blocks are trained for temperature 0, the other half for the sampled one.
_PTP = {"method": "ptp", "teacher_temperature": SAMPLED, "greedy_share": 0.5}
CONTESTANTS = (
    Contestant("independent", "independent slots", {**_PTP, "variant": "o", "independent": True}),
    Contestant("o-ptp", "O-PTP", {**_PTP, "variant": "o"}),
    Contestant("c-ptp", "C-PTP", {**_PTP, "variant": "c"}),
    Contestant("self-distil", "gated-LoRA self-distillation", {"method": "mask-tokens"}),
    # Unverified emission needs probabilities among all tokens, so there is no draft vocabulary.
    Contestant("conf-adapt", "one mask token, online objective", {"method": "conf-adapt", "draft_vocab": 0}),
)
LOSSY = "conf-adapt"  # the contestant of the tau sweep
