"""`mtp-mlx remember` and --memory as a person meets them: files, formats, notes, and mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from mtp_mlx.drafters.memory.memory_file import MemoryFile
from tests.drafters.memory.tables import memory_of
from tests.tiny import save_tiny

ROW = {"prompt": "the dog", "response": "the quick brown fox jumps over the lazy dog"}
CHAT = [
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "the fox"},
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "the lazy dog"},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remember")
    save_tiny(root / "model", "llama", seed=3)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def remember(folder: Path, out: Path, *more: object) -> Result:
    return run("remember", "-m", folder / "model", "--out", out, *more)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_answers_chats_and_texts(folder: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "a.mem", tmp_path / "notes.txt"
    text.write_text("the quick brown fox\n" * 3000, encoding="utf-8")
    data = [
        write(tmp_path / "answers.jsonl", ROW, {"text": "the sea"}),
        write(tmp_path / "chat.jsonl", {"messages": CHAT}),
    ]
    result = remember(folder, out, *data, text, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    file = MemoryFile(out)
    assert report["tokens"] == report["tokens_in_all"] == file.header.tokens > 3000
    assert report["entries"] == file.header.entries and report["bytes"] == out.stat().st_size
    assert f"-> {out}: {file.header.entries:,} n-grams" in result.stderr
    answers = [remember(folder, tmp_path / f"{path.stem}.mem", path, "--json") for path in (*data, text)]
    assert report["tokens"] == sum(json.loads(each.stdout)["tokens"] for each in answers)


def test_both_answers_of_a_chat_and_no_question(folder: Path, tmp_path: Path) -> None:
    whole = remember(folder, tmp_path / "a.mem", write(tmp_path / "a.jsonl", {"messages": CHAT}), "--json")
    parts = [
        remember(
            folder,
            tmp_path / f"{end}.mem",
            write(tmp_path / f"{end}.jsonl", {"messages": CHAT[:end]}),
            "--json",
        )
        for end in (2, 4)
    ]
    first, both = (json.loads(part.stdout)["tokens"] for part in parts)
    assert json.loads(whole.stdout)["tokens"] == both > first > 2


def test_the_ids_of_a_distilled_chat_are_those_of_its_last_answer(folder: Path, tmp_path: Path) -> None:
    row = {"messages": CHAT[:4], "response_tokens": [5] * 40, "finished": False}
    plain = {"messages": CHAT[:2]}  # the first answer, which these ids do not belong to
    counted = [
        json.loads(
            remember(
                folder, tmp_path / f"{name}.mem", write(tmp_path / f"{name}.jsonl", data), "--json"
            ).stdout
        )
        for name, data in (("row", row), ("plain", plain))
    ]
    assert counted[0]["tokens"] == 40 + counted[1]["tokens"]


def test_a_file_is_remembered_once(folder: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "a.mem", write(tmp_path / "answers.jsonl", ROW)
    remember(folder, out, data)
    before = MemoryFile(out).header.tokens
    again = remember(folder, out, data, write(tmp_path / "more.jsonl", {**ROW, "response": "the sea"}))
    assert again.exit_code == 0 and f"note: {data} was remembered before" in again.stderr
    assert before < MemoryFile(out).header.tokens < 2 * before
    more = remember(folder, tmp_path / "b.mem", data, data)
    assert more.exit_code == 0 and MemoryFile(tmp_path / "b.mem").header.tokens == before


@pytest.mark.parametrize("options", [["--layout", "linear"], ["--drafter", "memory", "--layout", "linear"]])
def test_generate_with_a_memory(folder: Path, tmp_path: Path, options: list[str]) -> None:
    """Written once, remembered, written again in fewer passes."""
    common = ["generate", "-m", folder / "model", "-a", "none", "-n", 30, "-p", "the dog", "--json"]
    plain = json.loads(run(*common, "--layout", "plain").stdout)
    answer = write(
        tmp_path / "own.jsonl",
        {"prompt": "the dog", "response": plain["text"], "response_tokens": plain["tokens"]},
    )
    assert remember(folder, tmp_path / "own.mem", answer).exit_code == 0
    result = run(*common, "--memory", tmp_path / "own.mem", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["text"] == plain["text"] and found["tokens"] == plain["tokens"]
    assert found["steps"] < plain["steps"] / 2 and set(found["stats"]["drafted_by"]) == {"memory"}
    off = json.loads(run(*common, "--layout", "plain", "--memory", "off").stdout)
    assert off["steps"] == plain["steps"]


def test_a_layout_without_drafts_says_so(folder: Path, tmp_path: Path) -> None:
    remember(folder, tmp_path / "a.mem", write(tmp_path / "a.jsonl", ROW))
    result = run(
        "generate",
        "-m",
        folder / "model",
        "-p",
        "the",
        "-n",
        4,
        "--layout",
        "plain",
        "--memory",
        tmp_path / "a.mem",
    )
    assert "note: no drafts from memory: this layout verifies no drafts" in result.stderr


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    """One sentence, exit code 2, and no file."""
    good, empty = write(tmp_path / "good.jsonl", ROW), tmp_path / "empty.txt"
    empty.write_text(" \n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"abc\xff\xfe")
    question = write(tmp_path / "question.jsonl", {"messages": CHAT[:1]})
    cases = [
        ([tmp_path / "missing.jsonl"], "missing.jsonl: cannot be read"),
        ([tmp_path], "is a folder: name the files in it"),
        ([empty], "empty.txt is empty"),
        ([binary], "binary.txt is not UTF-8 at byte 3"),
        ([good, write(tmp_path / "odd.jsonl", {"answer": "x"})], "odd.jsonl, line 1: no known format"),
        ([question], "question.jsonl, line 1: the last of"),
        ([good, "--max-size", "64"], "--max-size must be a size such as 64MB"),
        ([good, "--max-size", "10kB"], "--max-size must be at least 65kB"),
        ([good, "-m", tmp_path / "nowhere"], "no model"),
    ]
    for arguments, message in cases:
        result = remember(folder, tmp_path / "new.mem", *arguments)
        assert result.exit_code == 2 and message in result.stderr, (arguments, result.output)
        assert result.stderr.count("\n") == 1 and not (tmp_path / "new.mem").exists()
    assert run("remember", "--out", tmp_path / "new.mem").exit_code == 2


def test_other_files_and_tokenizers(folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", ROW)
    memory_of(tmp_path / "other.mem", [([1, 2], 0)], vocabulary="another")
    for name, message in (("a.jsonl", "a.jsonl is not a memory"), ("other.mem", "another tokenizer")):
        before = (tmp_path / name).read_bytes()
        for result in (
            remember(folder, tmp_path / name, data),
            run("generate", "-m", folder / "model", "-p", "the", "--memory", tmp_path / name),
        ):
            assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
        assert (tmp_path / name).read_bytes() == before
    lost = run("generate", "-m", folder / "model", "-p", "the", "--memory", tmp_path / "none.mem")
    assert lost.exit_code == 2 and "make one with `mtp-mlx remember`" in lost.stderr
    for arguments in (["chat", "--memory-learn"], ["serve", "--port", "0", "--memory-learn"]):
        learnt = run(*arguments, "-m", folder / "model")
        assert learnt.exit_code == 2 and "--memory-learn needs a file to learn into" in learnt.stderr
    assert "--memory-learn" not in run("generate", "--help").output


def test_chat_says_what_it_learns(folder: Path, tmp_path: Path) -> None:
    arguments = ["chat", "-m", str(folder / "model"), "-n", "12", "--memory", str(tmp_path / "own.mem")]
    result = CliRunner().invoke(cli.main, [*arguments, "--memory-learn"], input="the dog\n")
    tokens = MemoryFile(tmp_path / "own.mem").header.tokens
    assert f"answers are added to {tmp_path / 'own.mem'}" in result.stderr and 1 <= tokens <= 12
    assert f"{tokens} tokens of answers were added to the memory." in result.stderr
    silent = CliRunner().invoke(cli.main, arguments, input="the dog\n")
    assert "added to" not in silent.stderr and silent.stdout == result.stdout
    assert MemoryFile(tmp_path / "own.mem").header.tokens == tokens
