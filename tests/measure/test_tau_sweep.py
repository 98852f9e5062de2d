"""Proves that the sweep's figures are those of a count by hand, and that a stopped sweep goes on where it was."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.decode.emission import Emission
from mtp_mlx.errors import MTPError
from mtp_mlx.measure import tau_sweep
from mtp_mlx.measure.prompts import Prompt
from mtp_mlx.measure.tau_plot import svg
from mtp_mlx.measure.tau_sweep import Measured, SweepSettings, TauSweep, own_path, summarise
from tests.decode.fakes import attached, untouched
from tests.tiny import tiny_tokenizer

QUESTIONS = [Prompt("The sky is"), Prompt("add(1, 2)", answer=Decimal(3)), Prompt("print")]
SETTINGS = SweepSettings((0.05, 0.3, 1.0), 14)


def sweep(out: Path | None = None, settings: SweepSettings = SETTINGS, **changes: Any) -> TauSweep:
    arguments = {"questions": QUESTIONS, "name": "tiny", **changes}
    questions = arguments.pop("questions")
    return TauSweep(attached("llama"), tiny_tokenizer(), questions, settings, out, **arguments)


def test_own_path_against_one_pass_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tau_sweep, "LOGIT_ROWS", 3)
    prompt, tokens, plain = [3, 1, 4], [9, 2, 6, 5, 3, 5, 8], untouched("llama")
    agreeing, nll = 0, 0.0
    for index, token in enumerate(tokens):
        row = np.array(plain(mx.array([prompt + tokens[:index]]))[0, -1]).astype(np.float64)
        agreeing += int(row.argmax()) == token
        nll += float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token])
    found = own_path(attached("llama"), prompt, tokens)
    assert found[0] == agreeing and found[1] == pytest.approx(nll, rel=1e-5)
    greedy = []
    for _ in range(7):
        greedy.append(int(np.array(plain(mx.array([prompt + greedy]))[0, -1]).argmax()))
    assert own_path(attached("llama"), prompt, greedy)[0] == 7
    assert own_path(attached("llama"), prompt, []) == (0, 0.0)


def test_rows_of_a_sweep() -> None:
    rows = summarise(sweep().run())
    assert [row.tau for row in rows] == [None, 1.0, 0.3, 0.05]
    plain, sure = rows[:2]
    assert plain.agreement == plain.same == plain.tokens_per_pass == 1.0 and plain.lossless
    assert (sure.agreement, sure.same, sure.tokens_per_pass) == (1.0, 1.0, 1.0) and not sure.lossless
    assert sure.nll == pytest.approx(plain.nll)
    assert rows[-1].tokens_per_pass > 1.2 and rows[-1].agreement < 1 and rows[-1].same < 1
    assert rows[-1].nll > plain.nll
    assert {row.questions for row in rows} == {3}
    assert plain.right in (0.0, 1.0), "one question has an answer"


def test_summary_is_totals_over_totals() -> None:
    measured = [
        Measured(0.9, 0, 10, 4, 8, 5.0, False, True),
        Measured(0.9, 1, 30, 16, 30, 15.0, True, None),
        Measured(0.9, 2, 0, 0, 0, 0.0, True, False),
    ]
    (row,) = summarise(measured)
    assert (row.tokens_per_pass, row.agreement, row.nll) == (2.0, 0.95, 0.5)
    assert row.same == pytest.approx(2 / 3) and row.right == 0.5 and not row.lossless
    assert row.to_json()["same"] == 0.6667


def test_a_stopped_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "sweep.jsonl", sweep().run()
    calls: list[Measured] = []

    def stop_after_five(row: Measured) -> None:
        calls.append(row)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(out).run(stop_after_five)
    with out.open("a") as file:
        file.write('{"key": "')  # the line being written when it was killed
    measured = 0
    original = TauSweep._measure

    def counting(self: TauSweep, *arguments: Any) -> Measured:
        nonlocal measured
        measured += 1
        return original(self, *arguments)

    monkeypatch.setattr(TauSweep, "_measure", counting)
    assert sweep(out).run() == whole and measured == len(whole) - 5
    more = sweep(out, SweepSettings((*SETTINGS.taus, 0.6), 14))
    assert len(more.run()) == more.total == 15 and measured == len(whole) - 5 + 3
    assert len(out.read_text().splitlines()) == 15


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (SweepSettings(SETTINGS.taus, 15), {}),
        (SweepSettings(SETTINGS.taus, 14, drafts=2), {}),
        (SETTINGS, {"name": "other"}),
        (SETTINGS, {"questions": QUESTIONS[:2]}),
    ],
)
def test_another_sweep_s_file_is_refused(
    tmp_path: Path, settings: SweepSettings, changes: dict[str, Any]
) -> None:
    out = tmp_path / "sweep.jsonl"
    sweep(out)._kept.keep(Measured(0.3, 0, 1, 1, 1, 0.0, True, None))
    assert sweep(out)._done
    with pytest.raises(MTPError, match="a tau sweep of another model, adapter, questions or settings"):
        sweep(out, settings, **changes)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.jsonl").write_text("[1]\n{}\n")
    with pytest.raises(MTPError, match="line 1: no measurement of a tau sweep"):
        sweep(tmp_path / "sweep.jsonl")
    with pytest.raises(MTPError, match="at most 1; got 1.5"):
        sweep(None, SweepSettings((1.5,), 14))


NOT_ITS_OWN = [b"my notes", b"my notes\n", b'{"a": 1}', b"[" * 5000, b"caf\xe9\n", b'{"key": "other", "tau']


@pytest.mark.parametrize("content", NOT_ITS_OWN, ids=["text", "line", "json", "deep", "latin-1", "cut"])
def test_somebody_else_s_file_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(MTPError, match="give another `out`"):
        sweep(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("kept", [1, 20, -2, -1], ids=["brace", "key", "end", "newline"])
def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path, kept: int) -> None:
    """Only that one; where nothing but the end of the line is missing, it counts, and the next has its own line."""
    path, row = tmp_path / "sweep.jsonl", Measured(0.3, 0, 1, 1, 1, 0.0, True, None)
    for _ in range(2):
        sweep(path)._kept.keep(row)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] + whole[len(whole) // 2 :][:kept])
    sweep(path)._kept.keep(row)
    assert path.read_text() == whole + (whole[: len(whole) // 2] if kept == -1 else "")
    assert sweep(path)._done == {(0.3, 0): row}


# --- the plot ---------------------------------------------------------------------------------------------------


def test_the_plot_puts_points_where_they_belong() -> None:
    measured = [
        Measured(None, 0, 20, 20, 20, 1.0, True, True),
        Measured(0.9, 0, 20, 10, 18, 2.0, False, True),
        Measured(0.6, 0, 20, 5, 10, 9.0, False, False),
    ]
    root = ElementTree.fromstring(svg(summarise(measured), "a <b> & c"))
    space = {"svg": "http://www.w3.org/2000/svg"}
    circles = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.findall("svg:circle", space)]
    assert len(circles) == 9, "three series of three points"
    agreement = circles[:3]
    assert agreement[0][0] < agreement[1][0] < agreement[2][0], "tokens per pass grow to the right"
    assert agreement[0][1] < agreement[1][1] < agreement[2][1], "agreement falls downwards"
    halves = math.isclose(
        agreement[1][0] - agreement[0][0], (agreement[2][0] - agreement[0][0]) / 3, abs_tol=0.2
    )
    assert halves, "1, 2 and 4 tokens a pass lie on a linear axis"
    texts = [t.text for t in root.findall("svg:text", space)]
    assert {"plain", "0.9", "0.6", "a <b> & c", "tokens per forward pass"} <= set(texts)


def test_without_answers_there_is_no_curve_of_them() -> None:
    rows = summarise(
        [Measured(None, 0, 4, 4, 4, 1.0, True, None), Measured(0.9, 0, 4, 2, 4, 1.0, True, None)]
    )
    assert "answers right" not in svg(rows, "t") and "agreement" in svg(rows, "t")


def test_emission_default_tau_is_in_the_sweep_s_range() -> None:
    from mtp_mlx.cli.eval import EvalSettings

    assert Emission("conf-adapt").threshold in EvalSettings().tau
    assert min(EvalSettings().tau) == 0.6 and max(EvalSettings().tau) == 0.995
