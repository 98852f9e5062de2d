"""Proves that `distill` switches thinking by the template, keeps or drops thoughts, and that no thought without its
end is written or trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.chat_template import chat_ids
from mtp_mlx.cli import main
from mtp_mlx.cli.distill import summary_line
from mtp_mlx.errors import MTPError
from mtp_mlx.train import distill as module
from mtp_mlx.train.data import load_examples
from mtp_mlx.train.distill import DistillSettings, DistillSummary, distill
from tests.serve.scripted import ROWS, TAGS, TEMPLATE, save_agent
from tests.tiny import hf_tokenizer, tiny_model

THOUGHT, ANSWER = "Is it?\nYes.", "Because."
WHOLE = f"{THOUGHT}\n</think>\n\n{ANSWER}"
USER = [{"role": "user", "content": "Why?"}]
ALWAYS = "{{ messages[0]['content'] }}<think>\n"  # a template that cannot turn thinking off


def tokenizer_with(template: str) -> TokenizerWrapper:
    found = hf_tokenizer(300, chat_template=template)
    found.add_tokens(TAGS, special_tokens=False)
    return TokenizerWrapper(found)


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return tokenizer_with(TEMPLATE)


@pytest.fixture(autouse=True)
def scripted(tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model thinks unless thinking is off, and then answers."""

    def sampler(settings: DistillSettings, prompt: Any) -> Any:
        text = ANSWER if settings.thinking == "off" else WHOLE
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        rest = iter(ids)
        return lambda logprobs: mx.array([next(rest, ids[-1])])

    monkeypatch.setattr(module, "_sampler", sampler)


def settings(root: Path, **more: Any) -> DistillSettings:
    (root / "prompts.jsonl").write_text(
        '{"prompt": "Why?"}\n' + json.dumps({"messages": USER, "id": 2}) + "\n"
    )
    given = {"prompts": root / "prompts.jsonl", "out": root / "out.jsonl", "max_tokens": 80, **more}
    return DistillSettings(**given)


def answered(root: Path, tokenizer: Any, **more: Any) -> tuple[DistillSummary, list[dict[str, Any]]]:
    """(the summary, the rows: of the text prompt, and of the messages)."""
    summary = distill(tiny_model("llama", seed=3, vocab_size=ROWS), tokenizer, settings(root, **more))
    out = root / "out.jsonl"
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return summary, sorted(rows, key=lambda row: "messages" in row)


@pytest.mark.parametrize(
    ("options", "text", "prompt_thinks"),
    [
        ({}, WHOLE, True),
        ({"thinking": "on"}, WHOLE, True),
        ({"thinking": "off"}, ANSWER, False),
        ({"thinking": "on", "thoughts": "drop"}, ANSWER, False),
    ],
)
def test_rows_are_trained_on_behind_the_prompt_that_leads_to_them(
    tmp_path: Path, tokenizer: Any, options: dict[str, Any], text: str, prompt_thinks: bool
) -> None:
    summary, (row, chat) = answered(tmp_path, tokenizer, **options)
    assert (summary.written, summary.finished, summary.unended) == (2, 2, 0)
    assert row["response"] == text
    message = {"role": "assistant", "content": ANSWER}
    assert chat["messages"][-1] == message | ({"reasoning_content": THOUGHT} if text == WHOLE else {})
    examples, report = load_examples(tmp_path / "out.jsonl", tokenizer, 512)
    prompt = chat_ids(tokenizer, USER, options={"enable_thinking": prompt_thinks})
    expected = [*prompt, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    assert [example.tokens for example in examples] == [expected, expected] and report.unended == 0
    assert {example.loss_start for example in examples} == {len(prompt)}


@pytest.mark.parametrize("thoughts", ["keep", "drop"])
def test_a_thought_that_was_cut_is_counted_and_tried_again(
    tmp_path: Path, tokenizer: Any, thoughts: Any
) -> None:
    summary, rows = answered(tmp_path, tokenizer, max_tokens=4, thoughts=thoughts)
    assert (summary.written, summary.unended, rows) == (0, 2, [])
    assert "2 were left out, whose thinking has no end: raise --max-tokens" in summary_line(summary)
    summary, rows = answered(tmp_path, tokenizer, thoughts=thoughts)
    assert (summary.written, summary.unended, summary.skipped, len(rows)) == (2, 0, 0, 2)


def test_an_answer_that_was_cut_where_it_begins(tmp_path: Path, tokenizer: Any) -> None:
    to_the_end = len(tokenizer.encode(f"{THOUGHT}\n</think>", add_special_tokens=False))
    summary, (row, _) = answered(tmp_path, tokenizer, max_tokens=to_the_end)
    assert (summary.written, row["finished"]) == (2, False)  # the thought is whole
    (tmp_path / "out.jsonl").unlink()
    summary, rows = answered(tmp_path, tokenizer, max_tokens=to_the_end, thoughts="drop")
    assert (summary.unended, rows) == (2, [])  # nothing is left of it


def test_training_leaves_out_thoughts_without_an_end(tmp_path: Path, tokenizer: Any) -> None:
    cut = {"prompt": "Why?", "response": THOUGHT, "finished": False}
    opened = {**cut, "response": f"<think>\n{THOUGHT}", "chat_template_kwargs": {"enable_thinking": False}}
    whole = {"prompt": "Why?", "response": WHOLE}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (cut, whole, opened)))
    examples, report = load_examples(path, tokenizer, 512)
    assert len(examples) == 1 and report.unended == 2
    assert "2 rows dropped, whose thinking has no end" in str(report)
    path.write_text(json.dumps(cut))
    with pytest.raises(MTPError, match=r"1 of 1 end within the model's thinking"):
        load_examples(path, tokenizer, 512)
    path.write_text(json.dumps({**whole, "chat_template_kwargs": {"tokenize": False}}))
    with pytest.raises(MTPError, match=r"line 1: 'tokenize' is no variable of a chat template"):
        load_examples(path, tokenizer, 512)
    path.write_text(json.dumps({**whole, "chat_template_kwargs": "on"}))
    with pytest.raises(MTPError, match=r'line 1: "chat_template_kwargs" must be an object'):
        load_examples(path, tokenizer, 512)


def test_what_cannot_be_switched(tmp_path: Path) -> None:
    for options, message in (
        ({"thoughts": "drop"}, "`thoughts` cannot be drop: "),
        ({"thinking": "off"}, "has no switch for thinking: leave thinking at auto"),
    ):
        with pytest.raises(MTPError, match=message):
            answered(tmp_path, tokenizer_with(ALWAYS), **options)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command(tmp_path: Path) -> None:
    folder = save_agent(tmp_path / "saved") / "model"
    settings(tmp_path)
    arguments = ["distill", "-m", folder, "-p", tmp_path / "prompts.jsonl", "-o", tmp_path / "out.jsonl"]
    more = ["--thinking", "on", "--thoughts", "drop", "--max-tokens", 80, "--json"]
    result = CliRunner().invoke(main, [str(argument) for argument in [*arguments, *more]])
    assert result.exit_code == 0 and json.loads(result.stdout)["written"] == 2, result.output
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert row["chat_template_kwargs"] == {"enable_thinking": False} and "<think>" not in json.dumps(row)
