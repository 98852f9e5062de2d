"""Proves that a speed-up is a ratio of totals wherever one is reported, with the mean of ratios beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from mtp_mlx.cli import tune as cli_tune
from mtp_mlx.measure import answer_report, speed_report, tune
from mtp_mlx.measure.certificate import Comparison
from mtp_mlx.measure.evaluation import Answer
from mtp_mlx.measure.lanes import Lane, Measurement, Timed
from mtp_mlx.measure.prompts import Prompt
from mtp_mlx.measure.speed import compare_speeds, rate, ratio_text
from mtp_mlx.measure.speed_plot import svg


@dataclass
class Text:
    timed_tokens: int
    seconds: float


# A long text that gains nothing and a short one that is copied: (own, plain) of 100 and 10 tokens.
SLOW, COPIED = (Text(100, 10.0), Text(100, 10.0)), (Text(10, 0.1), Text(10, 1.0))
TOTALS = 11 / 10.1  # 110 tokens in 10.1 s and in 11 s
MEAN = (1 + 10) / 2


def test_a_copied_short_text_hardly_counts() -> None:
    speeds = compare_speeds([SLOW, COPIED])
    assert speeds.tokens_per_second == pytest.approx(110 / 10.1)
    assert speeds.plain_tokens_per_second == pytest.approx(10)
    assert speeds.speedup == pytest.approx(TOTALS) and speeds.mean_of_ratios == pytest.approx(MEAN)


def test_what_ended_within_its_first_step_is_left_out_on_both_sides() -> None:
    assert compare_speeds([SLOW, COPIED, (Text(0, 0.0), Text(5, 9.0))]) == compare_speeds([SLOW, COPIED])
    nothing = compare_speeds([(Text(0, 0.0), Text(5, 1.0))])
    assert (nothing.tokens_per_second, nothing.speedup, nothing.mean_of_ratios) == (0, None, None)
    assert rate([Text(0, 3.0)]) == 0


def test_the_mean_is_shown_where_it_differs() -> None:
    assert ratio_text(TOTALS, MEAN) == "1.09x (mean 5.50x)"
    assert ratio_text(1.234, 1.2339) == "1.23x" and ratio_text(2.0, None) == "2.00x"
    assert ratio_text(None, None) == "-" and ratio_text(None, None, "refused") == "refused"


def measurements() -> list[Measurement]:
    found = []
    for own, plain in (SLOW, COPIED):
        timed, reference = (Timed([1], text.timed_tokens, text.seconds) for text in (own, plain))
        timed.stats.tokens, timed.stats.steps = 2, 1
        found.append(Measurement(Prompt("x"), Lane("auto", "auto"), timed, reference, Comparison(True)))
    return found


def answers() -> list[Answer]:
    common: dict[str, Any] = {
        "category": "x", "tokens": 10, "passes": 5, "submitted": [], "accepted": [], "agreeing": 9, "nll": 5.0,
        "same": True, "right": None, "lossless": True, "text": "",
    }  # fmt: skip
    return [
        Answer(lane=lane, task=str(task), timed_tokens=text.timed_tokens, seconds=text.seconds, **common)
        for task, pair in enumerate((SLOW, COPIED))
        for lane, text in zip(("auto", "plain"), pair, strict=True)
    ]


def test_bench_eval_and_tune_report_totals() -> None:
    (bench,) = speed_report.summarise(measurements())
    evaluated = next(row for row in answer_report.summarise(answers()) if row.lane == "auto")
    (tuned,) = tune.results(measurements())
    for speedup, row in ((bench.speedup, bench), (evaluated.speedup, evaluated), (tuned.speed_up, tuned)):
        assert speedup == pytest.approx(TOTALS) and row.mean_of_ratios == pytest.approx(MEAN)
        assert row.to_json()["mean_of_ratios"] == 5.5
        assert row.tokens_per_second == pytest.approx(110 / 10.1)
    assert (
        bench.to_json()["speedup"] == evaluated.to_json()["speedup"] == tuned.to_json()["speed_up"] == 1.0891
    )


def test_tables_fit_a_terminal() -> None:
    """Nothing is cut off at 80 columns, and the mean follows the ratio."""
    (bench,), (tuned,) = speed_report.summarise(measurements()), tune.results(measurements())
    refused = replace(bench, category="math_reasoning", refused=1, certified=1, speedup=None)
    long = {"lane": "conf-adapt tau 0.05 drafts 4", "category": "math_reasoning", "acceptance": [0.5] * 4}
    evaluated = [replace(row, **long) for row in answer_report.summarise(answers())]
    for table, ends in (
        (speed_report.table([bench, refused]), ("2/2", "near-tie", "DIFFER)", "refused")),
        (answer_report.tables(evaluated), ("0.50/0.50/0.50/0.50", "90.0%")),
        (cli_tune.table([tuned]), ("yes",)),
    ):
        console = Console(width=80, file=StringIO())
        console.print(table)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        for shown in ("1.09x", "(mean", "5.50x)", *ends):
            assert shown in text and "…" not in text, f"{shown}\n{text}"


def test_the_table_says_which_drafter_earned_what() -> None:
    runs = measurements()
    for run, own, texts in zip(runs, (2, 0), (0, 5), strict=True):
        run.timed.stats.tokens = 8
        run.timed.stats.drafted_by.update({"heads": own, "memory": texts})
        run.timed.stats.submitted_by.update({"heads": 4, "memory": texts})
    (both,) = speed_report.summarise(runs)
    assert (both.tokens, both.drafted_by, both.submitted_by["heads"]) == (16, {"heads": 2, "memory": 5}, 8)
    assert both.to_json()["drafted_by"] == {"heads": 2, "memory": 5}
    plain = replace(both, lane="plain", drafted_by={}, submitted_by={})
    table = speed_report.earnings([both, plain])
    assert table is not None and [str(column.header) for column in table.columns[2:]] == [
        "tokens",
        "heads",
        "memory",
    ]
    assert [list(column.cells) for column in table.columns[3:]] == [["12 %", "-"], ["31 %", "-"]]
    assert speed_report.earnings([plain]) is None


def test_the_plot_says_so_too() -> None:
    for rows in (speed_report.summarise(measurements()), answer_report.summarise(answers())):
        assert "auto: 1.09x (mean 5.50x)" in svg(rows, "t")


def test_a_lane_that_only_copies_does_not_win() -> None:
    """Its mean of ratios is 5.5, its speed-up less than the margin of a tenth more tokens."""
    runs = measurements()
    runs[0].timed.seconds = 10.9
    assert tune.results(runs)[0].mean_of_ratios > 5 and tune.choose(runs).layout == "plain"
