"""Distilled answers: the model's own, whatever the batch; resumable, mended, readable as training data."""

from __future__ import annotations

import errno
import json

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from mtp_mlx.cli import main
from mtp_mlx.errors import MTPError
from mtp_mlx.train import distill as module
from mtp_mlx.train.data import load_examples
from mtp_mlx.train.distill import DistillSettings, distill
from mtp_mlx.train.distill_rows import read_prompts
from mtp_mlx.train.messages import prompt_ids
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

WORDS = [
    "The sky",
    "Is the dog lazy?",
    "def add(first):",
    "word " * 30,
    "Hi",
    "the sun and the fox",
    "1, 2, 3",
]
MAX_TOKENS = 14
EXTRA_EOS = {99}  # in the greedy text of some of WORDS, not of all


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(tmp_path):
    rows = [{"id": f"p{index}", "category": "qa", "prompt": text} for index, text in enumerate(WORDS)]
    return write(tmp_path / "prompts.jsonl", rows)


def settings(tmp_path, **options):
    defaults = {
        "prompts": prompts(tmp_path),
        "out": tmp_path / "out.jsonl",
        "max_tokens": MAX_TOKENS,
        "batch_size": 3,
    }
    return DistillSettings(**{**defaults, **options})


@pytest.fixture(scope="module")
def tokenizer():
    """With an eos that the tiny model's greedy text reaches in some answers and not in others."""
    wrapped = tiny_tokenizer()
    wrapped.eos_token_ids = {wrapped.eos_token_id, *EXTRA_EOS}
    return wrapped


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=3)


def alone(model, tokenizer, text):
    """Greedy generation of one prompt through mlx-lm: (ids without the eos, whether it ended)."""
    ids = mx.array(prompt_ids(tokenizer, text))
    tokens: list[int] = []
    for token, _ in generate_step(ids, model, max_tokens=MAX_TOKENS, sampler=make_sampler(temp=0.0)):
        if int(token) in tokenizer.eos_token_ids:
            return tokens, True
        tokens.append(int(token))
    return tokens, False


# --- answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_answers_are_those_of_generation_alone(tmp_path, model, tokenizer, batch_size):
    summary = distill(model, tokenizer, settings(tmp_path, batch_size=batch_size))
    rows = {row["prompt"]: row for row in rows_of(tmp_path / "out.jsonl")}
    assert set(rows) == set(WORDS)
    for text, row in rows.items():
        assert (row["response_tokens"], row["finished"]) == alone(model, tokenizer, text)
        assert row["response"] == tokenizer.decode(row["response_tokens"])
        assert row["category"] == "qa" and row["temperature"] == 0
    finished = sum(row["finished"] for row in rows.values())
    assert 0 < finished < len(WORDS), "the test needs both kinds of answer"
    assert (summary.written, summary.finished) == (len(WORDS), finished)
    assert summary.tokens == finished + sum(len(row["response_tokens"]) for row in rows.values())


def test_answers_are_training_data_with_the_very_ids(tmp_path, model, tokenizer):
    distill(model, tokenizer, settings(tmp_path))
    examples, _ = load_examples(tmp_path / "out.jsonl", tokenizer, 512)
    for row, example in zip(rows_of(tmp_path / "out.jsonl"), examples):
        prompt = prompt_ids(tokenizer, row["prompt"])
        assert example.loss_start == len(prompt)
        end = [tokenizer.eos_token_id] if row["finished"] else []
        assert example.tokens == [*prompt, *row["response_tokens"], *end]


def test_sampled_answers_depend_on_seed_and_prompt_not_on_the_batch(tmp_path, model, tokenizer):
    answers = []
    for name, options in {
        "a": {"batch_size": 1},
        "b": {"batch_size": 16},
        "c": {"seed": 1},
    }.items():
        distill(model, tokenizer, settings(tmp_path, out=tmp_path / name, temp=0.8, **options))
        answers.append({row["id"]: row["response_tokens"] for row in rows_of(tmp_path / name)})
    assert answers[0] == answers[1] != answers[2]
    assert len({tuple(tokens[:4]) for tokens in answers[0].values()}) > 3


def test_prompt_formats(tmp_path, model, tokenizer):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "sun"}]
    chat += [{"role": "user", "content": "The sky"}]
    source = write(
        tmp_path / "p.jsonl",
        [
            {"turns": ["The dog", "The fox"], "question_id": 4, "licence": "MIT", "source": "s"},
            {"messages": [*chat, {"role": "assistant", "content": "not this"}]},
        ],
    )
    distill(model, tokenizer, settings(tmp_path, prompts=source))
    by_kind = {"messages" in row: row for row in rows_of(tmp_path / "out.jsonl")}
    assert by_kind[False]["prompt"] == "The dog" and by_kind[False]["licence"] == "MIT"
    row = by_kind[True]
    assert row["messages"][:-1] == chat and "not this" not in json.dumps(row)
    assert row["messages"][-1]["content"] == tokenizer.decode(row["response_tokens"])
    assert len(load_examples(tmp_path / "out.jsonl", tokenizer, 512)[0]) == 2
    assert distill(model, tokenizer, settings(tmp_path, prompts=source)).skipped == 2


# --- resume -------------------------------------------------------------------------------------------------


class Stop:
    """Raises an error after n answers, as Ctrl-C or a full disk would."""

    def __init__(self, n, error=KeyboardInterrupt):
        self.left, self.error = n, error

    def __call__(self, answer):
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_ctrl_c_keeps_what_was_done_and_the_same_call_goes_on(tmp_path, model, tokenizer, temp):
    distill(model, tokenizer, settings(tmp_path, out=tmp_path / "whole.jsonl", temp=temp))
    stopped = distill(model, tokenizer, settings(tmp_path, temp=temp), on_answer=Stop(2))
    assert stopped.interrupted and stopped.written == 2
    before = (tmp_path / "out.jsonl").read_bytes()
    assert before.count(b"\n") == 2
    resumed = distill(model, tokenizer, settings(tmp_path, temp=temp))
    assert (resumed.skipped, resumed.written, resumed.interrupted) == (2, len(WORDS) - 2, False)
    assert (tmp_path / "out.jsonl").read_bytes().startswith(before)

    def by_id(name):
        return sorted(rows_of(tmp_path / name), key=lambda row: row["id"])

    assert by_id("out.jsonl") == by_id("whole.jsonl")
    again = distill(model, tokenizer, settings(tmp_path, temp=temp))
    assert (again.skipped, again.written) == (len(WORDS), 0)


def test_a_line_cut_while_it_was_written_is_dropped_and_answered_again(tmp_path, model, tokenizer):
    out = tmp_path / "out.jsonl"
    distill(model, tokenizer, settings(tmp_path))
    whole = out.read_bytes()
    out.write_bytes(whole[:-20])
    summary = distill(model, tokenizer, settings(tmp_path))
    assert "dropped the last line" in summary.note and summary.written == 1
    assert out.read_bytes() == whole
    out.write_bytes(whole[:-1])  # only the newline is missing: the answer is whole
    summary = distill(model, tokenizer, settings(tmp_path))
    assert (summary.note, summary.written) == ("", 0)
    assert out.read_bytes() == whole


def test_prompts_without_id_are_known_by_their_text_and_duplicates_are_left_out(tmp_path, model, tokenizer):
    source = write(tmp_path / "p.jsonl", [{"prompt": text} for text in ["Hi", "The sky", "Hi"]])
    options = settings(tmp_path, prompts=source, limit=1)
    assert distill(model, tokenizer, options).written == 1
    summary = distill(model, tokenizer, settings(tmp_path, prompts=source))
    assert (summary.written, summary.skipped, summary.duplicates) == (1, 2, 0)
    summary = distill(model, tokenizer, settings(tmp_path, prompts=source, out=tmp_path / "new.jsonl"))
    assert (summary.written, summary.duplicates) == (2, 1)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"prompt": "a"}\n{"prompt": "b', ["line 2", "truncated"]),
        ('{"question": "a"}\n', ["line 1", "no prompt", '"turns"']),
        ('{"prompt": ""}\n', ["line 1", "no prompt"]),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', ["nothing to answer"]),
        ('{"messages": 3}\n', ['"messages" must be a list']),
        ('{"messages": [{"content": "a"}]}\n', ["line 1", 'with a "role"']),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', ["line 2", "line 1. Make ids unique"]),
        ("", ["the file is empty"]),
    ],
)
def test_prompt_errors_name_file_and_line(tmp_path, model, tokenizer, text, parts):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(MTPError) as caught:
        distill(model, tokenizer, settings(tmp_path, prompts=path))
    assert all(part in str(caught.value) for part in ["p.jsonl", *parts]), str(caught.value)


def test_an_out_of_other_prompts_or_another_kind_is_refused(tmp_path, model, tokenizer):
    write(tmp_path / "out.jsonl", [{"id": "p0", "prompt": "Another", "response": "a"}])
    with pytest.raises(MTPError, match=r"line 1: .*out\.jsonl answers another prompt under the id 'p0'"):
        distill(model, tokenizer, settings(tmp_path))
    write(tmp_path / "out.jsonl", [{"text": "a"}])
    with pytest.raises(MTPError, match="does not hold answers"):
        distill(model, tokenizer, settings(tmp_path))


def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(tmp_path, model, tokenizer, monkeypatch):
    real, left = module.os.write, [2]

    def write_until_full(descriptor, line):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, line if left[0] else line[: len(line) // 2])

    monkeypatch.setattr(module.os, "write", write_until_full)
    with pytest.raises(MTPError, match="disk is full"):
        distill(model, tokenizer, settings(tmp_path))
    monkeypatch.undo()
    summary = distill(model, tokenizer, settings(tmp_path))
    assert summary.note and (summary.skipped, summary.written) == (1, len(WORDS) - 1)


def test_limit_reads_no_further(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\nbroken')
    assert [prompt.row for prompt in read_prompts(path, limit=1)] == [{"prompt": "a"}]


# --- command line -------------------------------------------------------------------------------------------


def invoke(tmp_path, *more):
    arguments = ["distill", "-m", tmp_path / "model", "-p", prompts(tmp_path), "-o", tmp_path / "out.jsonl"]
    return CliRunner().invoke(main, [str(argument) for argument in [*arguments, "--max-tokens", 5, *more]])


def test_command(tmp_path):
    save_tiny(tmp_path / "model", seed=3)
    result = invoke(tmp_path, "--limit", 3, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["written"] == 3 and summary["tok_per_s"] > 0 and not summary["interrupted"]
    assert "3 answers" in result.stderr
    assert "3 were answered before" in invoke(tmp_path, "--batch-size", 2).stderr
    assert [len(row["response_tokens"]) <= 5 for row in rows_of(tmp_path / "out.jsonl")] == [True] * len(
        WORDS
    )


def test_command_stopped_and_command_mistaken(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", seed=3)
    real = module.generate_answers

    def stopping(*arguments):
        for count, answer in enumerate(real(*arguments)):
            if count == 2:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(module, "generate_answers", stopping)
    result = invoke(tmp_path)
    assert result.exit_code == 130 and "the same command resumes from here" in result.stderr
    assert len(rows_of(tmp_path / "out.jsonl")) == 2
    (tmp_path / "bad.yaml").write_text("max_token: 3")
    result = invoke(tmp_path, "--config", tmp_path / "bad.yaml")
    assert result.exit_code == 2 and "Did you mean 'max_tokens'?" in result.stderr
    result = CliRunner().invoke(main, ["distill", "--out", "x"])
    assert result.exit_code == 2 and "--prompts is missing" in result.stderr
