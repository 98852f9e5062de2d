"""How fast one way of decoding is beside plain decoding, over several prompts.

The speed-up is a ratio of totals (all tokens over all seconds, on either side): how much sooner the whole work is
done. The mean of the prompts' own ratios can be far higher, since a short text copied at ten times the speed counts
as much in it as a long one. So it stands beside the speed-up, never in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Protocol


class Timing(Protocol):
    """A timed text: its tokens after the first step, and the seconds they took."""

    @property
    def timed_tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True)
class Speeds:
    """Speeds over the prompts that were timed on both sides.

    Attributes:
        tokens_per_second, plain_tokens_per_second: all tokens over all seconds; 0 if nothing was timed.
        mean_of_ratios: mean over prompts of the ratio of the two speeds; None if nothing was timed.
    """

    tokens_per_second: float
    plain_tokens_per_second: float
    mean_of_ratios: float | None

    @property
    def speedup(self) -> float | None:
        """The ratio of totals; None if nothing was timed."""
        return self.tokens_per_second / self.plain_tokens_per_second if self.plain_tokens_per_second else None


def compare_speeds(pairs: Iterable[tuple[Timing, Timing]]) -> Speeds:
    """The speeds of (one way, plain decoding), a pair for each prompt.

    A prompt whose text ended within the first step on either side says nothing of speed and is left out.
    """
    timed = [pair for pair in pairs if all(side.timed_tokens and side.seconds for side in pair)]
    ratios = [rate([own]) / rate([plain]) for own, plain in timed]
    own, plain = (rate([pair[side] for pair in timed]) for side in (0, 1))
    return Speeds(own, plain, mean(ratios) if ratios else None)


def rate(timings: Sequence[Timing]) -> float:
    """All tokens over all seconds; 0 if nothing was timed."""
    seconds = sum(timing.seconds for timing in timings if timing.timed_tokens)
    return sum(timing.timed_tokens for timing in timings) / seconds if seconds else 0.0


def ratio_text(speedup: float | None, mean_of_ratios: float | None, without: str = "-") -> str:
    """The speed-up for people, such as "1.20x", with the mean of ratios behind it where it differs."""
    if speedup is None:
        return without
    text = f"{speedup:.2f}x"
    if mean_of_ratios is None or f"{mean_of_ratios:.2f}x" == text:
        return text
    return f"{text} (mean {mean_of_ratios:.2f}x)"
