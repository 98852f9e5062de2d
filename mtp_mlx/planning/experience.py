"""What a model's generations learn about its drafters and its step costs on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mtp_mlx.decode.lookup import LOOKUP
from mtp_mlx.planning.acceptance import AcceptanceEstimate
from mtp_mlx.planning.agreement import Agreement
from mtp_mlx.planning.correction import CostCorrection
from mtp_mlx.planning.recalibration import Recalibration
from mtp_mlx.planning.trials import Trials

LOOKUP_DRAFTS = 23
LOOKUP_PRIOR = (0.45, 0.75, 0.85, 0.9)
TEXT_PRIOR = (0.4, 0.6, 0.7, 0.8)  # of drafts from other texts
TEXT_MEMORY = 300.0  # half-life of what is learnt of drafts from text, in drafts of a depth


@dataclass(frozen=True)
class Experience:
    """What has been learnt about a model on this machine; its generations share it and keep updating it.

    Attributes:
        acceptance: estimates by drafter name.
        cost: correction of the measured cost curve.
        agreement: what it says of a draft that other drafters agree, or speak against it.
        recalibration: how often submitted drafts were right, compared with what was said of them.
        trials: when the model's own drafter is tried again, if it is not in use.
    """

    acceptance: dict[str, AcceptanceEstimate]
    cost: CostCorrection
    agreement: Agreement = field(default_factory=Agreement)
    recalibration: Recalibration = field(default_factory=Recalibration)
    trials: Trials = field(default_factory=Trials)

    @classmethod
    def fresh(cls, own: str, drafts: int, prior: Sequence[float]) -> Experience:
        """An experience without observations.

        Args:
            own: name of the model's own drafter; "" if it has none.
            drafts: most drafts that it makes per step.
            prior: its recorded acceptance per depth.
        """
        acceptance = {
            own: AcceptanceEstimate(max(drafts, 1), list(prior) or None),
            LOOKUP: AcceptanceEstimate(LOOKUP_DRAFTS, LOOKUP_PRIOR, memory=TEXT_MEMORY),
        }
        return cls(acceptance, CostCorrection())

    def of(self, source: str) -> AcceptanceEstimate:
        """The estimate of a drafter; one that drafts from text alone gets it with its first drafts."""
        if source not in self.acceptance:
            self.acceptance[source] = AcceptanceEstimate(LOOKUP_DRAFTS, TEXT_PRIOR, memory=TEXT_MEMORY)
        return self.acceptance[source]
