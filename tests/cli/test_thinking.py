"""Proves that `generate` and `chat` switch thinking by the template, dim it, tell it apart from the answer, also if
it is cut, and drop it from the next turn as the template wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import mtp_mlx.api
import mtp_mlx.cli as cli
import mtp_mlx.conversation
from tests.serve.scripted import Scripted, save_agent
from tests.tiny import save_tiny

THOUGHT, ANSWER = "Is it?\nYes.", "Because."
DIM = click.style("x", dim=True).partition("x")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_agent(tmp_path_factory.mktemp("thinking"))
    save_tiny(root / "other", "llama", seed=3)
    return root


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of a model that thinks where the prompt lets it, and then answers."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    seen: list[str] = []
    real = mtp_mlx.api.stream_generate

    def scripted(model: Any, tokenizer: Any, ids: list[int], *args: Any, **options: Any) -> Any:
        seen.append(tokenizer.decode([*options.get("prefix", ()), *ids]))
        opened = seen[-1].endswith("<think>\n")
        says = tokenizer.encode(
            (f"{THOUGHT}\n</think>\n\n" if opened else "") + ANSWER, add_special_tokens=False
        )
        constraint = Scripted([*says, tokenizer.eos_token_id], model.vocab_size)
        return real(model, tokenizer, ids, *args, constraint=constraint, **options)

    for module in (mtp_mlx.api, mtp_mlx.conversation):
        monkeypatch.setattr(module, "stream_generate", scripted)
    return seen


def run(folder: Path, verb: str, *args: str, **how: Any) -> Result:
    options = ["-m", str(folder / "model"), "-a", str(folder / "adapter")]
    return CliRunner().invoke(cli.main, [verb, *options, *args], **how)


def generated(folder: Path, *args: str) -> Any:
    return json.loads(run(folder, "generate", "-p", "Why?", "--json", *args).stdout)


@pytest.mark.parametrize("layout", ["plain", "quadratic"])
def test_generate_on_off_and_cut(folder: Path, layout: str) -> None:
    for more in ([], ["--thinking", "on"]):
        on = generated(folder, "--layout", layout, *more)
        assert (on["answer"], on["thinking"]) == (ANSWER, THOUGHT)
        assert on["text"] == f"{THOUGHT}\n</think>\n\n{ANSWER}"  # the model's whole text
    off = generated(folder, "--layout", layout, "--thinking", "off")
    assert (off["text"], off["answer"], off["thinking"]) == (ANSWER, ANSWER, "")
    cut = generated(folder, "--layout", layout, "-n", "4")
    assert cut["finish_reason"] == "length" and cut["answer"] == "" and THOUGHT.startswith(cut["thinking"])


def test_generate_dims_thinking_in_a_terminal(folder: Path) -> None:
    plain = run(folder, "generate", "-p", "Why?").stdout
    assert plain == f"{THOUGHT}\n</think>\n\n{ANSWER}\n"  # a pipe gets no colours
    shown = run(folder, "generate", "-p", "Why?", "--layout", "plain", color=True).stdout
    thought, tag, answer = shown.partition("</think>")
    assert thought.startswith(DIM) and DIM in thought[-20:] and tag and click.unstyle(shown) == plain
    assert DIM not in answer.partition("Be")[2]


def test_chat_drops_thinking_from_the_next_turn(folder: Path, prompts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "talk"
    result = run(folder, "chat", input=f"Why?\nAnd then?\n/save {path}\n", color=True)
    assert result.exit_code == 0 and DIM in result.stdout, result.output
    assert f"{ANSWER}<|im_end|>" in prompts[1] and THOUGHT not in prompts[1]
    first = json.loads(path.read_text())["messages"][1]
    assert first == {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
    assert run(folder, "chat", "--thinking", "off", input="Why?\n").stdout == f"{ANSWER}\n"


def test_chat_with_a_thought_that_was_cut(folder: Path, prompts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "talk"
    result = run(folder, "chat", "-n", "4", input=f"Why?\nAnd then?\n/save {path}\n")
    assert result.exit_code == 0 and "Cut off after 4 tokens" in result.stderr, result.output
    first = json.loads(path.read_text())["messages"][1]
    assert first["content"] == "" and THOUGHT.startswith(first["reasoning_content"])
    assert first["reasoning_content"] not in prompts[1].partition("assistant")[2]


def test_what_cannot_be_switched(folder: Path) -> None:
    other = ["-m", str(folder / "other"), "-a", "none", "--thinking"]
    for verb in ("generate", "chat", "serve"):
        prompt = ["-p", "x"] if verb == "generate" else []
        port = ["--port", "0"] if verb == "serve" else []
        for thinking in ("on", "off"):
            result = CliRunner().invoke(cli.main, [verb, *other, thinking, *prompt, *port])
            assert result.exit_code == 2 and f"no thinking to turn {thinking}" in result.output, result.output
    raw = run(folder, "generate", "-p", "x", "--raw", "--thinking", "on")
    assert raw.exit_code == 2 and "--thinking needs the chat template" in raw.output
