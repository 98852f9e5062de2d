"""The methods that are compared, and the temperatures at which they are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SAMPLED = 0.7  # the temperature measured besides 0; PTP is trained for it


@dataclass(frozen=True)
class Contestant:
    """One trained method.

    Attributes:
        name: name of its folder.
        title: title of its row in the table.
        method: as in `mtp-mlx train METHOD`.
        settings: settings of the method that differ from the common ones.
    """

    name: str
    title: str
    method: str
    settings: dict[str, Any]

    @property
    def noise(self) -> str:
        """The sampling method above temperature 0, which drafter and target share."""
        return "inverse-cdf" if self.method == "ptp" else "gumbel"


# Half of the blocks are trained for temperature 0, the other half for the other temperature.
_PTP = {"teacher_temperature": SAMPLED, "greedy_share": 0.5}
CONTESTANTS = (
    Contestant("independent", "independent slots", "ptp", {**_PTP, "variant": "o", "independent": True}),
    Contestant("o-ptp", "O-PTP", "ptp", {**_PTP, "variant": "o"}),
    Contestant("c-ptp", "C-PTP", "ptp", {**_PTP, "variant": "c", "draft_vocab": 0}),
    Contestant("self-distil", "gated-LoRA self-distillation", "mask-tokens", {}),
    # Unverified emission needs probabilities over the full vocabulary.
    Contestant("conf-adapt", "one mask token, online objective", "conf-adapt", {"draft_vocab": 0}),
)
LOSSY = "conf-adapt"  # the contestant of the tau sweep
