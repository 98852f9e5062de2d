"""The methods that are compared, and the temperatures they are measured at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SAMPLED = 0.7  # measured besides 0; PTP is trained on its uniforms


@dataclass(frozen=True)
class Contestant:
    """One trained method.

    Attributes:
        name: of its folder.
        title: of its row.
        method: as in `mtp-mlx train METHOD`.
        settings: of the method, besides those that all contestants have in common.
    """

    name: str
    title: str
    method: str
    settings: dict[str, Any]

    @property
    def noise(self) -> str:
        """How its text is drawn above temperature 0: drafters use the target's noise."""
        return "inverse-cdf" if self.method == "ptp" else "gumbel"


# Half of the blocks stand for temperature 0, the other half for the temperature that is measured too.
_PTP = {"teacher_temperature": SAMPLED, "greedy_share": 0.5}
CONTESTANTS = (
    Contestant("independent", "independent slots", "ptp", {**_PTP, "variant": "o", "independent": True}),
    Contestant("o-ptp", "O-PTP", "ptp", {**_PTP, "variant": "o"}),
    Contestant("c-ptp", "C-PTP", "ptp", {**_PTP, "variant": "c"}),
    Contestant("self-distil", "gated-LoRA self-distillation", "mask-tokens", {}),
    # Where drafts are emitted unverified, a probability must be one among all tokens.
    Contestant("conf-adapt", "one mask token, online objective", "conf-adapt", {"draft_vocab": 0}),
)
LOSSY = "conf-adapt"  # the contestant of the tau sweep
