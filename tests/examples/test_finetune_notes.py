"""Proves that the notes script goes from files to an adapter and a measured speed-up, in reduced form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from examples import finetune_notes
from mtp_mlx.adapter_folder import read_header
from mtp_mlx.errors import MTPError
from tests.tiny import save_tiny

SMALL = ["--warmup", "1", "--held-out", "2", "--measure-every", "0", "--slots", "2", "--rank", "2"]
SMALL += ["--sampler-width", "8", "--draft-vocab", "60", "--max-length", "600"]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "notes"
    (folder / "deeper").mkdir(parents=True)
    (folder / "one.md").write_text("The dog and the fox rest in the sun together.\n\n" * 3)
    (folder / "deeper" / "two.txt").write_text("The air scatters the light of the sun, so the sky is blue.\n")
    (folder / "picture.png").write_bytes(b"\x89PNG not text at all, and long enough to be a passage of it")
    return folder


def test_from_notes_to_speed_up(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = save_tiny(tmp_path / "model", seed=3), tmp_path / "adapter"
    words = [str(notes), "--model", str(model), "--out", str(out), "--steps", "2", "--max-tokens", "10"]
    monkeypatch.setattr(sys, "argv", ["finetune_notes.py", *words, *SMALL])
    finetune_notes.main()
    said = capsys.readouterr()
    assert "6 prompts; acceptance by depth on held-out answers: 0." in said.out
    assert "times the speed of plain mlx-lm; 3 of 3 texts the same" in said.out
    assert said.err.count("$ mtp-mlx ") == 3
    assert read_header(out).training["steps"] == 2
    files = tmp_path / "adapter-files"
    trained, held = ((files / f"{name}.jsonl").read_text().splitlines() for name in ("prompts", "held_out"))
    assert len(trained) == 3 and len(held) == 3 and not set(trained) & set(held)
    answered = [json.loads(line) for line in (files / "answers.jsonl").read_text().splitlines()]
    assert len(answered) == 3


def test_passages_are_cut_between_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {n} " + "x" * 500 for n in range(5)]
    (tmp_path / "a.md").write_text("\n\n".join(paragraphs))
    pieces = finetune_notes.passages(tmp_path)
    assert len(pieces) == 3 and all(len(piece) <= finetune_notes.PASSAGE for piece in pieces)
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MTPError, match="is not a folder"):
        finetune_notes.passages(tmp_path / "nowhere")
    with pytest.raises(MTPError, match="has no .md or .txt file"):
        finetune_notes.passages(tmp_path)
    with pytest.raises(MTPError, match="1 passages are too few"):
        finetune_notes.write_prompts(["a passage"], tmp_path)
    with pytest.raises(MTPError, match=r"mtp-mlx info: .*nowhere"):
        finetune_notes.run("info", str(tmp_path / "nowhere"))
