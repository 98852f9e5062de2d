"""When a drafter that does not pay is tried again.

Whether it pays changes with the texts, and as long as it does not draft, nothing more is learnt of it. So it is tried
for a few steps now and then, over all texts of a model: at growing intervals as long as the trials do not pay.
"""

from __future__ import annotations

FIRST_TRIAL, LAST_TRIAL = 48, 384  # steps without its drafts before it is tried again: at first, and at most
TRIAL_STEPS = 8  # of a trial; in the first one it may have to read the text before, so that one is not judged


class Trials:
    """Counts the steps of a model's generations, and says when its own drafter is tried."""

    def __init__(self) -> None:
        self._waited, self._after, self._left = 0, FIRST_TRIAL, 0
        self._gained = 0.0  # tokens beyond those that a trial's seconds had to bring

    @property
    def running(self) -> bool:
        """Whether the next step has to draft."""
        return self._left > 0

    def count(self, drafted: bool, gained: float) -> bool:
        """Counts a step. Returns whether a trial ended with it.

        Args:
            drafted: whether it asked the drafter for drafts.
            gained: its tokens beyond those that its seconds had to bring.
        """
        if self._left:
            self._gained += gained if self._left < TRIAL_STEPS else 0.0
            self._left -= 1
            if not self._left:
                self._after = FIRST_TRIAL if self._gained > 0 else min(2 * self._after, LAST_TRIAL)
            return not self._left
        self._waited = 0 if drafted else self._waited + 1
        if self._waited >= self._after:
            self._waited, self._left, self._gained = 0, TRIAL_STEPS, 0.0
        return False
