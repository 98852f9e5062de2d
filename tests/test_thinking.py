"""Proves that Python switches thinking and tells it apart: `chat_prompt`, `stream_generate`, `Conversation`."""

from __future__ import annotations

from typing import Any

import pytest

from mtp_mlx import chat_prompt, load, stream_generate
from mtp_mlx.chat_template import Thinking
from mtp_mlx.conversation import Conversation
from tests.serve.scripted import Scripted, save_agent

THOUGHT, ANSWER = "Is it?\nYes.", "Because."
WHOLE = f"{THOUGHT}\n</think>\n\n{ANSWER}"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    root = save_agent(tmp_path_factory.mktemp("thinking"))
    return load(str(root / "model"), root / "adapter")


def script(loaded: tuple[Any, Any], text: str) -> Scripted:
    model, tokenizer = loaded
    return Scripted(
        [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id], model.vocab_size
    )


@pytest.mark.parametrize("layout", ["plain", "quadratic"])
def test_on_off_and_cut(loaded: tuple[Any, Any], layout: Any) -> None:
    for thinking, text, thought in (("on", WHOLE, THOUGHT), ("auto", WHOLE, THOUGHT), ("off", ANSWER, "")):
        prompt = chat_prompt(loaded[1], "Why?", thinking=thinking)
        given = {"layout": layout, "constraint": script(loaded, text)}
        responses = list(stream_generate(*loaded, prompt, **given))
        parts = ["".join(r.text for r in responses if r.thinking is thinks) for thinks in (True, False)]
        assert "".join(parts) == text and parts[0].startswith(thought) and ANSWER not in parts[0]
        assert parts[1].strip() == ANSWER and responses[-1].finish_reason == "stop"
    prompt = chat_prompt(loaded[1], "Why?", thinking="on")
    cut = list(stream_generate(*loaded, prompt, 4, layout=layout, constraint=script(loaded, WHOLE)))
    assert all(r.thinking for r in cut) and cut[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("thinking", "max_tokens", "text", "thought"),
    [("on", 80, ANSWER, THOUGHT), ("off", 80, ANSWER, ""), ("on", 4, "", None)],
)
def test_a_conversation(
    loaded: tuple[Any, Any], thinking: Thinking, max_tokens: int, text: str, thought: str | None
) -> None:
    talk = Conversation(*loaded, thinking=thinking)
    says = ANSWER if thinking == "off" else WHOLE
    list(talk.ask("Why?", max_tokens, layout="plain", constraint=script(loaded, says)))
    turn = talk.turns[-1]
    assert turn.text == text and (turn.thinking == thought or thought is None)
    assert THOUGHT.startswith(turn.thinking) and bool(turn.thinking) == (thinking == "on")
