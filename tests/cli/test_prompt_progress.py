"""Proves that a long prompt is reported on stderr, and a short one is not."""

from __future__ import annotations

import pytest

from mtp_mlx.cli import prompt_progress
from mtp_mlx.cli.prompt_progress import PromptProgress


def test_a_long_prompt_is_reported_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(prompt_progress.time, "monotonic", lambda: clock[0])
    progress = PromptProgress()
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
    progress = PromptProgress()
    progress(5, 9)
    progress(9, 9)
    assert capsys.readouterr().err == ""
