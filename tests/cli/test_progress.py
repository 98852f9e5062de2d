"""Proves that something long is reported on stderr, and something short is not."""

from __future__ import annotations

import pytest

from mtp_mlx.cli import progress as progress_module
from mtp_mlx.cli.progress import cost_progress, prompt_progress


def test_a_long_prompt_is_reported_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    progress = prompt_progress()
    for second in range(1, 15):
        clock[0] = float(second)
        progress(second * 100, 8000)
    progress(8000, 8000)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "reading the prompt: 200 of 8,000 tokens",
        "reading the prompt: 1,200 of 8,000 tokens",
    ]


def test_a_short_prompt_is_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    progress = prompt_progress()
    progress(5, 9)
    progress(9, 9)
    assert capsys.readouterr().err == ""


def test_in_a_terminal_a_measurement_is_a_line_that_replaces_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: True)
    progress = cost_progress()
    for done in (1, 2, 3, 4):
        clock[0] = 0.3 * done
        progress(done, 4)
    printed = capsys.readouterr().err.split("\r\033[K")
    assert printed == ["", "measuring: 2 of 4 sizes of a step", "measuring: 3 of 4 sizes of a step", ""]
