"""The trace of a generation says what every step did, and its sums are those of the generation's own counts."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.lookup import LookupDrafter
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.planning.budget import BudgetPolicy
from mtp_mlx.planning.explain import explain
from mtp_mlx.planning.trace import VARIABLE, Trace, read_trace, traced
from tests.planning.test_budget import cost_of
from tests.tiny import tiny_model


def test_every_step_of_a_generation_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stats = tmp_path / "trace.jsonl", DecodeStats()
    monkeypatch.setenv(VARIABLE, str(path))
    model = attach(tiny_model("llama", seed=3))
    prompt = [3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5]
    policy = BudgetPolicy(cost_of(0.02), 0, [], "")
    list(
        mtp_generate_step(
            prompt, model, max_tokens=40, policy=policy, lookup=LookupDrafter(3, 1), stats=stats
        )
    )
    steps = list(read_trace(path))
    assert len(steps) == stats.steps and sum(step.tokens for step in steps) == stats.tokens
    assert Counter(step.tokens for step in steps) == stats.histogram
    assert any(step.parents for step in steps) and any(not step.parents for step in steps)
    assert all(step.seconds > 0 and step.expected_seconds > 0 for step in steps)
    assert [step.context for step in steps[:2]] == [len(prompt) - 1, len(prompt) - 1 + steps[0].tokens]
    found = explain(steps)
    assert sum(form.tokens for form in found.forms) == stats.tokens
    assert sum(one.drafts * one.observed for one in found.chances) == pytest.approx(sum(stats.accepted))


def test_a_tree_and_its_accepted_path() -> None:
    proposal = Proposal(
        "slots", DraftTree((7, 8, 9), (-1, -1, 1), (0.5, 0.25, 0.5)), ("slots", "lookup", "lookup")
    )
    step = traced(proposal, Layout.tree((-1, -1, 1), (0, 0, 0, 2), 4), [8, 9, 3], 5, (2.0, 3.0, 1.0))
    assert step.accepted == [1, 2] and step.tokens == 3 and step.form == "tree and slots"
    assert step.expected_tokens == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert list(step.reached()) == [("slots", 0.5, False), ("lookup", 0.25, True), ("lookup", 0.5, True)]
    (form,) = explain([step, step]).forms
    assert (form.steps, form.tokens, form.seconds, form.plain_seconds, form.lost) == (2, 6, 6.0, 6.0, 0.0)


def test_a_bin_says_how_far_luck_may_take_it() -> None:
    """The share of right drafts scatters by `deviation` if chances are true: counted over 400 runs of 120 drafts."""
    generator, chances = np.random.default_rng(7), np.array([0.62, 0.65, 0.68])
    off = []
    for _ in range(400):
        right = generator.random(120) < np.tile(chances, 40)
        steps = [
            traced(
                Proposal.chain("heads", [7], [chance]),
                Layout.chained(1, 0),
                [7 if ok else 8, 3][: 1 + ok],
                5,
                (1.0,) * 3,
            )
            for chance, ok in zip(np.tile(chances, 40).tolist(), right.tolist(), strict=True)
        ]
        (found,) = explain(steps).chances
        off.append((found.observed - found.predicted) / found.deviation)
    assert found.drafts == 120 and np.std(off) == pytest.approx(1.0, abs=0.12) and abs(np.mean(off)) < 0.2


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_file_that_is_gone_is_begun_anew(tmp_path: Path, how: str) -> None:
    """While the process runs, as in a server whose trace is cleared."""
    path, other = tmp_path / "trace.jsonl", tmp_path / "before.jsonl"
    trace, steps = Trace(str(path)), []
    for context in range(4):
        steps.append(traced(Proposal("slots"), Layout.plain(), [3], context, (1.0, 1.0, 1.0)))
        trace.write(steps[-1])
        if context == 1:
            path.rename(other)
            if how == "removed":
                other.unlink()
    assert list(read_trace(path)) == steps[2:]
    assert how == "removed" or list(read_trace(other)) == steps[:2]


def test_a_file_that_cannot_be_written_or_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(MTPError, match="MTP_MLX_TRACE: .* cannot be written"):
        Trace(str(tmp_path / "missing" / "trace.jsonl"))
    step = traced(Proposal("slots"), Layout.plain(), [3], 5, (1.0, 1.0, 1.0))
    (tmp_path / "folder").mkdir()
    gone = Trace(str(tmp_path / "folder" / "trace.jsonl"))
    shutil.rmtree(tmp_path / "folder")
    with pytest.raises(MTPError, match="MTP_MLX_TRACE: .* cannot be written"):
        gone.write(step)
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(MTPError, match="not a step of a trace"):
        list(read_trace(tmp_path / "other.jsonl"))
