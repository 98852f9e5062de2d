"""Proves that an evaluation's figures are those of a count by hand, lossy lanes labelled, and that it goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from mtp_mlx.decode.emission import Emission
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.errors import MTPError
from mtp_mlx.measure.answer_report import summarise
from mtp_mlx.measure.code_tasks import CodeTask
from mtp_mlx.measure.evaluation import PLAIN, Answer, Evaluation, EvaluationSettings
from mtp_mlx.measure.lanes import Lane
from mtp_mlx.measure.prompts import Prompt
from mtp_mlx.measure.tau_sweep import own_path
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import attached, random_adapter
from tests.measure.test_code_tasks import HUMANEVAL, MBPP
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

LOSSY = Lane("conf-adapt tau 0.05", "linear", emission=Emission("conf-adapt", 0.05))
LANES = [Lane("quadratic", "quadratic"), LOSSY]
PROMPTS = [Prompt("add(1, 2)", "math", "a", Decimal(3)), Prompt("The sky is", "chat", "b")]
SETTINGS = EvaluationSettings(14)


def evaluation(out: Path | None = None, **changes: Any) -> Evaluation:
    arguments: dict[str, Any] = {
        "prompts": PROMPTS,
        "lanes": LANES,
        "settings": SETTINGS,
        "name": "tiny",
        **changes,
    }
    prompts, lanes, settings = (arguments.pop(name) for name in ("prompts", "lanes", "settings"))
    return Evaluation(attached("llama"), tiny_tokenizer(), prompts, lanes, settings, out, **arguments)


def test_lanes_beside_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []

    def judge(self: Prompt, answer: str) -> bool:
        judged.append(answer)
        return len(judged) == 2

    monkeypatch.setattr(Prompt, "is_right", judge)
    answers = evaluation().run()
    assert [(a.task, a.lane) for a in answers] == [
        (p.name, lane.name) for p in PROMPTS for lane in [PLAIN, *LANES]
    ]
    plain, verified, lossy = answers[:3]
    assert (
        plain.same and verified.same and not lossy.same and (plain.lossless, lossy.lossless) == (True, False)
    )
    count = plain.tokens
    assert (
        count > 5
        and plain.passes == plain.agreeing == verified.tokens == count
        and verified.nll == pytest.approx(plain.nll)
    )
    assert verified.passes <= count and sum(verified.submitted) >= sum(verified.accepted)
    assert lossy.passes < lossy.tokens and lossy.agreeing < lossy.tokens and not lossy.submitted
    assert lossy.nll / lossy.tokens > plain.nll / count
    assert plain.timed_tokens == count - 1 and 0 < verified.timed_tokens < count and plain.seconds > 0
    assert judged[:3] == [a.text for a in answers[:3]] and judged[0] == judged[1] != judged[2]
    assert [a.right for a in answers[:3]] == [False, True, False]


def test_agreement_is_the_own_path_s() -> None:
    (answer,) = evaluation(prompts=PROMPTS[:1], lanes=[]).run()
    ids = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": PROMPTS[0].text}], add_generation_prompt=True
    )
    found = evaluation(prompts=PROMPTS[:1])._generate(list(ids), PLAIN, 14)
    assert (answer.agreeing, answer.nll) == pytest.approx(
        own_path(attached("llama"), list(ids), found.tokens)
    )


def answer(lane: str, task: str, category: str, **changes: Any) -> Answer:
    values: dict[str, Any] = {
        "tokens": 10, "passes": 5, "timed_tokens": 8, "seconds": 2.0, "submitted": [4, 2], "accepted": [2, 1],
        "agreeing": 9, "nll": 5.0, "same": True, "right": None, "lossless": True, "text": "", **changes,
    }  # fmt: skip
    return Answer(lane, task, category, **values)


def test_rows_are_totals_over_totals() -> None:
    answers = [
        answer("plain", "1", "math", seconds=4.0, submitted=[], accepted=[]),
        answer("plain", "2", "chat", seconds=4.0, submitted=[], accepted=[]),
        answer("x", "1", "math", right=True, same=False, lossless=False),
        answer("x", "2", "chat", tokens=30, passes=5, right=False, submitted=[4], accepted=[4]),
        answer("plain", "3", "chat"),  # its other lane was not measured before a stop
    ]
    rows = {(row.lane, row.category): row for row in summarise(answers)}
    assert list(rows) == [(lane, c) for lane in ("plain", "x") for c in ("math", "chat", "all")]
    whole = rows["x", "all"]
    assert (whole.tasks, whole.tokens_per_second, whole.plain_tokens_per_second) == (2, 4.0, 2.0)
    assert whole.speedup == 2.0 and whole.tokens_per_step == 4.0 and whole.acceptance == [6 / 8, 0.5]
    assert whole.agreement == 18 / 40 and whole.perplexity == pytest.approx(math.exp(10 / 40))
    assert (whole.same, whole.right, whole.judged) == (0.5, 0.5, 2)
    assert not whole.lossless and rows["x", "chat"].lossless and rows["plain", "all"].right is None
    assert rows["plain", "all"].acceptance == [] and rows["plain", "chat"].tasks == 1
    assert whole.to_json()["perplexity"] == round(math.exp(0.25), 4)


def test_a_stopped_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "e.jsonl", 0

    def stop(_: Answer) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    expected = [(a.task, a.lane, a.tokens, a.same) for a in evaluation().run()]
    assert not all(same for *_, same in expected)
    with pytest.raises(KeyboardInterrupt):
        evaluation(out).run(stop)
    assert len(out.read_text().splitlines()) == 4
    measured: list[str] = []
    original = Evaluation._answer

    def counting(self: Evaluation, task: Any, lane: Lane, *arguments: Any) -> Any:
        measured.append(lane.name)
        return original(self, task, lane, *arguments)

    monkeypatch.setattr(Evaluation, "_answer", counting)
    whole = evaluation(out).run()
    assert measured == [lane.name for lane in LANES], "only what was missing"
    assert [(a.task, a.lane, a.tokens, a.same) for a in whole] == expected
    with pytest.raises(MTPError, match="holds an evaluation of another model"):
        evaluation(out, name="other")
    with pytest.raises(MTPError, match="another model, adapter, questions or settings"):
        evaluation(out, settings=EvaluationSettings(15))


@pytest.mark.parametrize(
    "changes",
    [
        {"answer": Decimal(4)},
        {"category": "sums"},
        {"text": "add(1, 3)"},
        {"code": CodeTask("Mbpp", "add(1, 2)", "another beginning")},
    ],
    ids=["answer", "category", "text", "beginning"],
)
def test_answers_to_another_prompt_are_not_taken_over(tmp_path: Path, changes: dict[str, Any]) -> None:
    out = tmp_path / "e.jsonl"
    evaluation(out, prompts=PROMPTS[:1])._kept.keep(answer("plain", "a", "math"))
    assert evaluation(out, prompts=PROMPTS[:1])._done
    with pytest.raises(MTPError, match="another model, adapter, questions or settings"):
        evaluation(out, prompts=[replace(PROMPTS[0], **changes)])


def test_names_must_differ() -> None:
    with pytest.raises(MTPError, match="the lane 'quadratic' is there twice"):
        evaluation(lanes=[LANES[0], LANES[0]])
    with pytest.raises(MTPError, match="the task 'a' is there twice"):
        evaluation(prompts=[PROMPTS[0], PROMPTS[0]])


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    save_tiny(root / "model", "llama", seed=3)
    model = tiny_model("llama", seed=3)
    adapter = random_adapter(model)
    save_adapter(root / "adapter", adapter, mask_header(adapter.config, "tiny", base_fingerprint(model)))
    (root / "gsm8k.jsonl").write_text('{"question": "The sky", "answer": "#### 3"}\n')
    (root / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (HUMANEVAL, MBPP)))
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))


def run(folder: Path, *args: str) -> Result:
    options = ["-m", str(folder / "model"), "-a", str(folder / "adapter"), "-n", "8"]
    return CliRunner().invoke(cli.main, ["eval", *options, *args])


def test_the_command(folder: Path, tmp_path: Path) -> None:
    files = [f"--gsm8k={folder / 'gsm8k.jsonl'}", f"--questions={folder / 'code.jsonl'}"]
    kept = ["--out", str(tmp_path / "e.jsonl"), "--plot", str(tmp_path / "e.svg")]
    options = [*files, *kept, "--layout", "linear", "--emit", "conf-adapt", "--tau", "0.05"]
    result = run(folder, *options, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows = {(row["lane"], row["category"]): row for row in report["rows"]}
    assert {lane for lane, _ in rows} == {"plain", "linear", "conf-adapt tau 0.05"}
    assert {category for _, category in rows} == {"gsm8k", "code", "all"}
    assert report["finished"] and report["method"] == "mask-tokens"
    assert rows["linear", "all"]["same"] == 1.0 and rows["linear", "all"]["lossless"]
    assert not rows["conf-adapt tau 0.05", "all"]["lossless"] and rows["plain", "all"]["judged"] == 1
    assert rows["plain", "code"]["right"] is None and rows["linear", "code"]["tokens_per_second"] > 0
    assert rows["linear", "all"]["acceptance"] and (tmp_path / "e.svg").read_text().startswith("<svg")
    again = run(folder, *options)
    assert again.exit_code == 0 and len((tmp_path / "e.jsonl").read_text().splitlines()) == 9
    assert "speed against the model alone" in again.stdout and "…" not in again.stdout
    assert "conf-adapt tau 0.05 (lossy)" in again.stdout and "100%" in again.stdout


def test_other_numbers_of_drafts_are_measured_again(folder: Path, tmp_path: Path) -> None:
    """They are other lanes; auto has its own number and is taken over."""
    options = ["--limit", "1", "--layout", "quadratic", "--layout", "auto", "--emit", "static"]
    options += ["--out", str(tmp_path / "e.jsonl"), "--json"]
    lanes = []
    for option, drafts in (("--drafts", "2"), ("--slots", "1")):
        result = run(folder, *options, option, drafts)
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)["rows"]
        lanes.append(list(dict.fromkeys(row["lane"] for row in rows)))
        assert max(len(row["acceptance"]) for row in rows if row["lane"].startswith("quad")) == int(drafts)
    quadratic, _, static = lanes[0][1:]
    assert quadratic == "quadratic drafts 2" and static.endswith(" drafts 2")
    assert lanes[1] == ["plain", "quadratic drafts 1", "auto", static.replace("2", "1")]
    assert len((tmp_path / "e.jsonl").read_text().splitlines()) == 4 + 2


def test_plan_reads_its_report(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "--limit", "1", "--layout", "quadratic", "--json")
    (tmp_path / "report.json").write_text(result.stdout)
    planned = CliRunner().invoke(
        cli.main, ["plan", "--curve", "m5-max", "--bench", str(tmp_path / "report.json")]
    )
    assert planned.exit_code == 0 and "lane quadratic" in planned.stdout, planned.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tau", "0.5"], "--tau is the threshold of --emit conf-adapt"),
        (["--emit", "static", "-a", "none"], "needs an adapter with mask tokens"),
        (["--layout", "quadratic", "-a", "none"], "needs an adapter"),
        (["--questions", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--sweep-tau", "--gsm8k", "x"], "--sweep-tau works with neither --gsm8k nor --samples"),
        (["--sweep-tau", "--samples", "x.jsonl"], "--sweep-tau works with neither --gsm8k nor --samples"),
        (["--samples", "x.json"], "--samples must be a .jsonl file"),
        (["--samples", "x.jsonl", "--out", "./x.jsonl"], "x.jsonl is read or written by this run already"),
        (["--samples", "q.jsonl", "--questions", "q.jsonl"], "give --samples another file"),
        (["--emit", "conf-adapt", "--tau", "2"], "at most 1; got 2"),
    ],
)
def test_first_mistakes(folder: Path, args: list[str], message: str) -> None:
    result = run(folder, *args)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == "", result.output
