"""Turns tokens into text as they come, holding back text that could still become a stop string."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mtp_mlx.token_ids import knows

WITHOUT_TEXT = "the model wrote ids that its tokenizer does not know: they have no text"


class StopStrings:
    """Passes text on up to the first stop string.

    Args:
        stops: strings that end the text; they are not part of it.

    Attributes:
        stopped: whether a stop string was found.
        found: that string, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that is now safe to show and has not been shown yet."""
        if self.stopped:
            return ""
        self._held += text
        found = [(position, stop) for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            first, self.found = min(found)
            shown, self._held = self._held[:first], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """The text that was still held back, once no more will come."""
        shown, self._held = self._held, ""
        return "" if self.stopped else shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest suffix of the held text that is a proper prefix of `stop`."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0


class AnswerText:
    """The text of one generation, and its end: an end-of-text token, a stop string or `max_tokens`.

    Args:
        tokenizer: mlx-lm's wrapper.
        stop: strings that end the text; they are not part of it.
        max_tokens: most tokens of the text; negative for no limit.
        notes: counts, in words, the ids that have no text.

    Attributes:
        count: tokens so far, including an end-of-text token.
        stops: the stop strings, and which of them was found.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str], max_tokens: int, notes: Counter[str] | None = None
    ) -> None:
        self._eos_ids, self._detokenizer = tokenizer.eos_token_ids, tokenizer.detokenizer
        self._tokenizer, self._notes = tokenizer, Counter() if notes is None else notes
        self._max_tokens = max_tokens
        self.stops = StopStrings(stop)
        self.count = 0

    def feed(self, token: int) -> tuple[str, str | None]:
        """(text that became final with `token`, "stop", "length" or None before the end)."""
        self.count += 1
        reason = "length" if self.count == self._max_tokens else None
        if token in self._eos_ids:
            reason = "stop"
        elif knows(self._tokenizer, token):
            self._detokenizer.add_token(token)
        else:  # mlx-lm's detokenizers write "!", or fail
            self._notes[WITHOUT_TEXT] += 1
        if reason is not None:
            self._detokenizer.finalize()
        text = self.stops.feed(self._detokenizer.last_segment)
        if self.stops.stopped:
            return text, "stop"
        return (text if reason is None else text + self.stops.finish()), reason
