"""Counts of what happened while decoding. Nothing here is estimated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mtp_mlx.decode.layout import Layout


@dataclass
class DecodeStats:
    """Counts of one generation.

    Attributes:
        tokens: tokens committed by decoding steps; the consumer may have stopped inside the last block.
        steps: forward passes after prefill.
        rows: rows in those passes.
        submitted, accepted: per depth (index 0 is the first draft), drafts that verification reached, and drafts
            accepted.
        histogram: {tokens per step: number of steps}.
        layouts: {"drafts/slots": number of steps}; "drafts/3 heads" if heads drafted 3 tokens after the pass, and
            "tree drafts/slots" if the drafts had branches.
        drafted_by: {drafter: drafts accepted}.
        submitted_by: {drafter: drafts submitted for verification}.
        choices: {choice: drafts accepted that were the likeliest of their place in the pass (1), the second, ...}.
        fallbacks: {reason: count} of everything that did not run as requested.
        notes: sentences on what ran as requested and may still surprise, such as a prompt beyond the model's context.
        lossless: every token was the model's own pick; False if drafts were emitted unverified.
        looped: such as "4 heads to 8 drafts" if MTP heads are used more than once per step, else empty.
        verdict: what the planner of layout "auto" concluded, such as that nothing beats plain decoding.
        tuned: what layout "auto" uses from `mtp-mlx tune`, else empty.
    """

    tokens: int = 0
    steps: int = 0
    rows: int = 0
    submitted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    histogram: Counter[int] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    drafted_by: Counter[str] = field(default_factory=Counter)
    submitted_by: Counter[str] = field(default_factory=Counter)
    choices: Counter[int] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    lossless: bool = True
    looped: str = ""
    verdict: str = ""
    tuned: str = ""

    def record(
        self,
        layout: Layout,
        kept: Sequence[int],
        drafters: Sequence[str],
        own: str = "",
        rows: int | None = None,
        choices: Sequence[int] = (),
    ) -> None:
        """Counts a step.

        Args:
            layout: the step's layout.
            kept: real rows of the pending token and of the accepted drafts.
            drafters: [d] name of each draft's drafter.
            own: name of the model's own drafter, which makes the next drafts.
            rows: rows of the pass, if more than the layout's.
            choices: [d] see `DraftTree.choices`; all 1 by default.
        """
        n_accepted = len(kept) - 1
        self.steps += 1
        self.rows += layout.rows if rows is None else rows
        self.tokens += 1 + n_accepted
        self.histogram[1 + n_accepted] += 1
        behind = f"{layout.chain} {own}" if layout.chain else "+".join(map(str, layout.slots))
        self.layouts[f"{'tree ' if layout.parents else ''}{layout.drafts}/{behind}"] += 1
        self.submitted_by.update(drafters)
        self.drafted_by.update(drafters[row - 1] for row in kept[1:])
        self.choices.update(choices[row - 1] if choices else 1 for row in kept[1:])
        reached = n_accepted + layout.continues(kept[-1])
        for counts, upto in ((self.submitted, reached), (self.accepted, n_accepted)):
            counts.extend([0] * (layout.depth - len(counts)))
            for depth in range(upto):
                counts[depth] += 1

    def record_emitted(self, real_rows: int, slots: int, n_emitted: int) -> None:
        """Counts a pass over `real_rows` and `slots` that emitted `n_emitted` tokens without verifying them."""
        self.steps += 1
        self.rows += real_rows + slots
        self.tokens += n_emitted
        self.histogram[n_emitted] += 1
        self.layouts[f"{real_rows} real/{slots} unverified"] += 1
        if n_emitted > 1:
            self.drafted_by["slots, unverified"] += n_emitted - 1

    @property
    def tokens_per_step(self) -> float:
        """Tokens per forward pass; 0 before the first pass."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def rows_per_step(self) -> float:
        """Rows per forward pass."""
        return self.rows / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> list[float | None]:
        """Per depth, P(accepted | reached); None if no draft was reached there."""
        return [a / s if s else None for a, s in zip(self.accepted, self.submitted, strict=True)]

    def add(self, other: DecodeStats) -> None:
        """Adds the counts of another generation."""
        self.tokens += other.tokens
        self.steps += other.steps
        self.rows += other.rows
        for own, more in ((self.submitted, other.submitted), (self.accepted, other.accepted)):
            own.extend([0] * (len(more) - len(own)))
            for depth, count in enumerate(more):
                own[depth] += count
        self.histogram.update(other.histogram)
        self.layouts.update(other.layouts)
        self.drafted_by.update(other.drafted_by)
        self.submitted_by.update(other.submitted_by)
        self.choices.update(other.choices)
        self.fallbacks.update(other.fallbacks)
        self.notes += [note for note in other.notes if note not in self.notes]
        self.lossless &= other.lossless
        self.looped = self.looped or other.looped
        self.tuned = self.tuned or other.tuned

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values, for `--json`."""
        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "tokens_per_step": round(self.tokens_per_step, 4),
            "rows_per_step": round(self.rows_per_step, 3),
            "acceptance": [None if value is None else round(value, 4) for value in self.acceptance],
            "histogram": {str(size): count for size, count in sorted(self.histogram.items())},
            "layouts": dict(self.layouts.most_common()),
            "drafted_by": dict(self.drafted_by),
            "submitted_by": dict(self.submitted_by),
            "choices": {str(choice): count for choice, count in sorted(self.choices.items())},
            "fallbacks": dict(self.fallbacks),
            "notes": list(self.notes),
            "lossless": self.lossless,
            "looped": self.looped,
            "verdict": self.verdict,
            "tuned": self.tuned,
        }
