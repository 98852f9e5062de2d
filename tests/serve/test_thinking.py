"""Proves that the server keeps thinking apart from the answer, in streams too, switches it by the template, lets a
JSON schema begin behind it, and hands it back to the template, which drops it when the next question comes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.serve.prompts import Limits
from mtp_mlx.serve.sequence import DecodeSettings, Sequence
from tests.serve.running import NAME, Server, save_model, serving
from tests.serve.scripted import TAGS, acting, agent_tool, save_agent, weather
from tests.tiny import hf_tokenizer

openai = pytest.importorskip("openai")

THOUGHT, ANSWER = "Is it?\n\nYes.", "Because."
WHY = [{"role": "user", "content": "Why?"}]


def thinker(prompt: str) -> str:
    """Thinks where the prompt lets it, and then answers."""
    return (f"{THOUGHT}\n</think>\n\n" if prompt.endswith("<think>\n") else "") + ANSWER


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_agent(tmp_path_factory.mktemp("thinking"))


@pytest.fixture(scope="module", params=["plain", "quadratic"])
def server(request: pytest.FixtureRequest, root: Path) -> Iterator[Server]:
    with acting(root, thinker, decode=DecodeSettings(layout=request.param)) as running:
        yield running


def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def gpt(server: Server) -> Iterator[Any]:
    with client(server) as found:
        yield found


def asked(gpt: Any, streaming: bool, messages: list[Any] = WHY, **more: Any) -> tuple[str, str, str]:
    """(answer, thinking, reason)."""
    wanted = {"model": NAME, "messages": messages, **more}
    if not streaming:
        choice = gpt.chat.completions.create(**wanted).choices[0]
        thinking = getattr(choice.message, "reasoning_content", "")
        assert thinking == getattr(choice.message, "reasoning", "")
        return choice.message.content, thinking, choice.finish_reason
    chunks = list(gpt.chat.completions.create(**wanted, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert thoughts == [getattr(delta, "reasoning", None) or "" for delta in deltas]
    answer = "".join(delta.content or "" for delta in deltas)
    return answer, "".join(thoughts), chunks[-1].choices[0].finish_reason


@pytest.mark.parametrize("streaming", [False, True])
def test_on_off_and_cut(gpt: Any, streaming: bool) -> None:
    for more in (
        {},
        {"reasoning_effort": "high"},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}},
    ):
        assert asked(gpt, streaming, **more) == (ANSWER, THOUGHT, "stop")
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    for more in ({"reasoning_effort": "none"}, {"reasoning_effort": "minimal"}, {"extra_body": off}):
        assert asked(gpt, streaming, **more) == (ANSWER, "", "stop")
    answer, thinking, reason = asked(gpt, streaming, max_tokens=5)
    assert answer == "" and thinking and THOUGHT.startswith(thinking) and reason == "length"


def test_the_server_s_setting(root: Path) -> None:
    with acting(root, thinker, limits=Limits(thinking="off")) as running, client(running) as gpt:
        assert asked(gpt, False) == (ANSWER, "", "stop")
        assert asked(gpt, False, reasoning_effort="low") == (ANSWER, THOUGHT, "stop")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_goes_back_to_the_template(server: Server, gpt: Any, name: str) -> None:
    """Which keeps it while tools are called, and drops it when the next question comes."""
    made = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    thought = {"role": "assistant", "content": "", name: "Hm, Oslo", "tool_calls": [made]}
    talk = [*WHY, thought, {"role": "tool", "tool_call_id": "a", "content": "7 degrees"}]
    asked(gpt, False, talk)
    assert "<think>Hm, Oslo</think>" in server.engine.seen[-1]
    asked(gpt, False, [*talk, {"role": "assistant", "content": "7"}, *WHY])
    assert "Hm, Oslo" not in server.engine.seen[-1] and "7 degrees" in server.engine.seen[-1]


def test_a_call_behind_thinking(root: Path) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": agent_tool()}}]
    with acting(root, weather) as running, client(running) as gpt:
        choice = gpt.chat.completions.create(model=NAME, messages=WHY, tools=tools).choices[0]
    assert choice.message.reasoning_content == "The user asks for the weather."
    assert choice.message.content == "Let me see." and choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.name == "get_weather"


class Begun:
    """A `Constraint` that forces the first tokens, and leaves the rest to another one."""

    def __init__(self, tokens: list[int], inner: Any) -> None:
        self._tokens, self._inner, self._at = tokens, inner, 0

    def allowed(self, drafts: list[int]) -> Any:
        rows = self._inner.allowed(drafts)
        for row, token in enumerate(self._tokens[self._at : self._at + len(rows)]):
            assert rows[row].all(), "while it thinks, nothing is forbidden"
            rows[row] = False
            rows[row, token] = True
        return rows

    def commit(self, tokens: list[int]) -> None:
        self._at += len(tokens)
        self._inner.commit(tokens)


@pytest.mark.parametrize("layout", ["plain", "quadratic"])
def test_a_schema_begins_behind_thinking(root: Path, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thought is a script, and the answer the random model's, held to the schema."""
    thought = hf_tokenizer(300)
    thought.add_tokens(TAGS)
    tokens = thought.encode(f"{THOUGHT}\n</think>", add_special_tokens=False)

    def sequence(model: Any, tokenizer: Any, request: Any, *rest: Any) -> Sequence:
        settings, prefixes, constraint, shared = rest
        begun = Begun(tokens, constraint)
        return Sequence(model, tokenizer, request, settings, prefixes, begun, shared)

    monkeypatch.setattr("mtp_mlx.serve.engine.Sequence", sequence)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "blue"]}}}
    with acting(root, thinker, decode=DecodeSettings(layout=layout)) as running, client(running) as gpt:
        answer, thinking, reason = asked(gpt, False, response_format=form, temperature=1.0, seed=2)
    assert json.loads(answer) in ("red", "blue") and thinking == THOUGHT and reason == "stop"


def test_a_model_that_does_not_think(tmp_path: Path) -> None:
    """Asking for thinking has no effect there, which the response says."""
    with serving(save_model(tmp_path)) as running:
        body = {"messages": WHY, "max_tokens": 3, "reasoning_effort": "high"}
        status, answer = running.ask("/v1/chat/completions", body)
    assert status == 200 and "reasoning_content" not in answer["choices"][0]["message"]
    assert any("no thinking to turn on" in note for note in answer["mtp"]["fallbacks"])
