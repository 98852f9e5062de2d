"""StopStrings: however text is cut into pieces, what comes out is the text before the first stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.text import StopStrings

PIECES = st.lists(st.text("ab\n", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab\n", max_size=4), max_size=3)


@given(PIECES, STOPS)
def test_equals_str_find(pieces: list[str], stops: list[str]) -> None:
    """The text ends at the stop string that is complete first; of several, at the one that begins first."""
    text, held = "".join(pieces), StopStrings(stops)
    shown = ""
    for count, piece in enumerate(pieces, start=1):
        shown += held.feed(piece)
        so_far = "".join(pieces[:count])
        found = [so_far.find(stop) for stop in stops if stop and stop in so_far]
        assert held.stopped == bool(found)
        if found:
            assert shown == text[: min(found)] and held.finish() == "" and held.feed("ab") == ""
            return
        assert so_far.startswith(shown)
        waiting = so_far[len(shown) :]
        assert waiting == "" or any(stop.startswith(waiting) and stop != waiting for stop in stops)
    assert shown + held.finish() == text and held.finish() == ""


def test_text_is_held_back_no_longer_than_needed() -> None:
    stops = StopStrings(["\n\n"])
    assert [stops.feed(piece) for piece in ["a", "\n", "b", "\n", "\nc"]] == ["a", "", "\nb", "", ""]
    assert stops.stopped


def test_without_stops_everything_passes() -> None:
    stops = StopStrings(["", ""])
    assert stops.feed("abc") == "abc" and stops.finish() == "" and not stops.stopped
