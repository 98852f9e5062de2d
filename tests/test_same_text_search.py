"""The search for texts that are not the model's own finds a planted bug and makes it small; its seed decides all."""

from __future__ import annotations

import json
import os
import shlex
from typing import Any

import mlx.core as mx
import pytest
import same_text_search
from click.testing import CliRunner

from mtp_mlx.decode import step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.rollback import LayerCaches
from text_search import search, shrinking
from text_search.case import Case, Text, from_json
from text_search.drawing import allowed, draw
from text_search.verdict import Verdict, judge

RESTLESS = Case(
    architecture="qwen3",
    drafter="mask-tokens",
    acceptance=0.6,
    drafts=3,
    layout="quadratic",
    lookup="text",
    prefill_step_size=3,
    sampling=SamplingConfig(temperature=0.8, top_k=7, seed=5),
    stop=("zz",),
    texts=(Text((9, 5, 33, 8, 60, 12, 9, 5, 33), 18),),
)


def keep_one_row_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plants a bug: a rejected draft stays in the cache."""
    keep = LayerCaches.keep

    def careless(self: LayerCaches, n_rows: int) -> None:
        keep(self, n_rows + (1 if n_rows > 1 else 0))

    monkeypatch.setattr(LayerCaches, "keep", careless)


def test_a_planted_bug_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(RESTLESS).kind == "same"
    keep_one_row_too_many(monkeypatch)
    verdict = judge(RESTLESS)
    assert verdict.is_finding
    case, again = shrinking.smallest(RESTLESS, verdict, judge)
    assert again.kind == verdict.kind == judge(case).kind
    assert case.lookup == "none" and not case.stop and case.prefill_step_size == 2048
    assert case.sampling == SamplingConfig() and case.architecture == "llama"
    assert len(case.texts[0].prompt) <= 2 and case.texts[0].max_tokens <= 8
    assert case.drafter != "none" and case.layout != "plain", "without drafts nothing is rolled back"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_text_search, "prefer_openblas", lambda: None)


def searched(*options: str) -> Any:
    return CliRunner().invoke(same_text_search.main, ["--jobs", "1", *options])


def test_the_command_that_is_printed_shows_the_finding_again(
    in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_one_row_too_many(monkeypatch)
    monkeypatch.setattr(shrinking, "MOST_RUNS", 25)
    result = searched("--seed", "1", "--cases", "60", "--findings", "1", "--json")
    assert result.exit_code == 1, result.output
    (found,) = json.loads(result.stdout)["findings"]
    assert found["kind"] in ("different text", "error", "different bits")
    assert judge(draw(1, found["number"])).is_finding
    line = same_text_search.command(json.dumps(found["case"]))
    words = shlex.split(line)
    assert words[:3] == ["python", "benchmarks/same_text_search.py", "--case"]
    again = searched(*words[2:])
    assert again.exit_code == 1 and again.stdout.startswith(found["kind"])
    monkeypatch.undo()
    monkeypatch.setattr(same_text_search, "prefer_openblas", lambda: None)
    mended = searched(*words[2:])
    assert mended.exit_code == 0 and mended.stdout.strip() == "same"


def test_the_seed_decides_the_cases() -> None:
    first = [draw(4, number) for number in range(30)]
    assert first == [draw(4, number) for number in range(30)]
    assert first[7:] == [draw(4, number) for number in range(7, 30)], "a case does not depend on those before"
    assert len({case.to_json() for case in first + [draw(5, number) for number in range(30)]}) == 60


def test_a_case_runs_the_same_way_every_time() -> None:
    """Verdicts count drafts, so layouts and acceptance are the same too, whatever ran before."""
    numbers = [number for number in range(40) if draw(4, number).layout in ("auto", "mixed")][:6]
    forwards = [judge(draw(4, number)) for number in numbers]
    assert forwards == [judge(draw(4, number)) for number in reversed(numbers)][::-1]
    assert sum(verdict.accepted for verdict in forwards) and sum(verdict.rejected for verdict in forwards)


def test_processes_share_the_cases_of_one() -> None:
    alone = {one.number: one.verdict for one in search.outcomes(4, range(6))}
    shared = {one.number: one.verdict for one in search.shared_outcomes(4, 6, jobs=2)}
    assert shared == alone and sorted(shared) == list(range(6))


def dies_at_three(pipe: Any, seed: int, first: int, step: int, most: int) -> None:
    """A process that MLX ends at case 3."""
    for number in range(first, most, step):
        pipe.send(number)
        if number == 3:
            os.abort()
        pipe.send(search.Outcome(number, Case(), Verdict("same")))


def test_a_case_that_ends_its_process_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others run nevertheless."""
    monkeypatch.setattr(search, "work", dies_at_three)
    found = {one.number: one for one in search.shared_outcomes(4, 8, jobs=2)}
    assert sorted(found) == list(range(8))
    assert [number for number, one in found.items() if one.verdict.is_finding] == [3]
    assert found[3].case == draw(4, 3) and found[3].verdict.detail == "the process ended with SIGABRT"


def test_everything_is_drawn() -> None:
    """All architectures, drafters, layouts, dtypes, caches, and ways; what is drawn is allowed."""
    cases = [draw(0, number) for number in range(250)]
    for name, count in {
        "architecture": 20, "drafter": 10, "layout": 5, "dtype": 3, "bits": 3, "kv_bits": 3, "window": 4,
        "lookup": 3, "way": 3, "exact": 2, "acceptance": 4, "prefill_step_size": 4, "tau": 2,
    }.items():  # fmt: skip
        assert len({getattr(case, name) for case in cases}) >= count, name
    assert any(case.stop for case in cases) and any(case.sampling.repetition_penalty != 1 for case in cases)
    assert all(allowed(case) for case in cases[:40])


def test_json_and_back() -> None:
    for number in range(20):
        case = draw(2, number)
        assert from_json(case.to_json()) == case
    assert json.loads(Case().to_json()) == {"texts": [{"prompt": [1]}]}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{", "is not JSON"),
        ("[]", 'a list "texts"'),
        ('{"texts":[]}', 'a list "texts"'),
        ('{"texts":[5]}', "every text must be an object"),
        ('{"texts":[{"prompt":[5]}],"layuot":"linear"}', "Did you mean 'layout'"),
        ('{"texts":[{"prompt":["x"]}]}', "must be a whole number"),
        ('{"texts":[{"prompt":[5]}],"dtype":"int8"}', "must be one of float32"),
        ('{"texts":[{"prompt":[5]}],"architecture":"lama"}', "Did you mean 'llama'"),
        ('{"texts":[{"prompt":[]}]}', "at least one token"),
        ('{"texts":[{"prompt":[900]}]}', "rows for 0 to 156"),
        ('{"texts":[{"prompt":[5]}],"layout":"quadratic"}', "does not go together"),
    ],
)
def test_a_case_that_is_none(given: str, says: str, in_this_process: None) -> None:
    result = searched("--case", given)
    assert result.exit_code == 2 and says in result.stderr and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_ctrl_c_prints_what_was_found(in_this_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Verdict("different text", "text 0, token 1: 5, not 7")

    def outcomes(*_: Any) -> Any:
        yield search.Outcome(0, Case(), Verdict("same"))
        yield search.Outcome(1, RESTLESS, found, (Case(texts=(Text((7,)),)), found))
        raise KeyboardInterrupt

    monkeypatch.setattr(same_text_search, "shared_outcomes", outcomes)
    result = searched("--minutes", "1")
    assert result.exit_code == 130
    assert "2 cases" in result.stdout and '"prompt":[7]' in result.stdout and found.detail in result.stdout


def test_an_error_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a case that fails in another way is not the same finding."""

    def broken(*_: Any) -> None:
        raise ValueError("no rows")

    monkeypatch.setattr(LayerCaches, "keep", broken)
    verdict = judge(RESTLESS)
    assert verdict.kind == "error" and verdict.detail.startswith("ValueError: no rows")
    assert not verdict.is_like(Verdict("error", "TypeError: no rows"))
    assert not verdict.is_like(Verdict("different text"))


def test_a_wrong_pick_is_no_near_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits agree to the last bit, so rounding would explain any difference; but the noise is another position's."""
    accepted = step._accepted

    def shifted(session: Any, logits: Any, positions: Any, *rest: Any) -> Any:
        return accepted(session, logits, positions + 1, *rest)

    monkeypatch.setattr(step, "_accepted", shifted)
    sampling = SamplingConfig(temperature=1.2, seed=3)
    case = Case(drafter="mask-tokens", layout="linear", sampling=sampling, texts=(Text((9, 5, 4), 8),))
    verdict = judge(case)
    assert verdict.kind == "different text" and "not what its own logits say" in verdict.detail


def test_the_first_rows_of_a_window_lie_in_memory_as_in_mlx_lm() -> None:
    """Found by the search: layers without rotary embeddings read keys that are a view, not a copy; BLAS tells."""
    text = Text((58, 58, 14, 145, 58, 58, 14, 145, 58, 58), 1)
    assert judge(Case(architecture="smollm3", bits=8, exact=True, window=16, texts=(text,))).kind == "same"


def test_rounding_of_a_hybrid_in_half_precision_is_excused() -> None:
    """The rows of a pass move the logits of Mamba-2 in bfloat16 by .5: in mlx-lm too."""
    case = Case(
        "granitemoehybrid", "bfloat16", 8, "mtp-heads", 1.0, layout="linear", texts=(Text((46,), 13),)
    )
    assert judge(case).kind in ("near tie", "same")


def test_changes_of_logits_are_seen_where_rows_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    from text_search import running

    case = Case(drafter="mask-tokens", acceptance=1.0, layout="linear", exact=True, texts=(Text((9, 5), 6),))
    assert judge(case).kind == "same"
    real = running.found

    def off(*args: Any) -> Any:
        texts, stats = real(*args)
        texts[0].logits[3] = texts[0].logits[3] + mx.array(1e-6)
        return texts, stats

    monkeypatch.setattr(running, "found", off)
    assert judge(case).kind == "different bits"
