"""Proves that the unmodified `anthropic` client runs a tool loop with thinking against the server, streaming and not,
also by its own runner of tools; and that wrong requests get a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.serve.prompts import Limits
from tests.serve.running import NAME, Server
from tests.serve.scripted import acting, agent_tool, call, save_agent, weather

anthropic = pytest.importorskip("anthropic")

TOOLS = [{"name": "get_weather", "description": "The weather in a city", "input_schema": agent_tool()}]
QUESTION = [{"role": "user", "content": "The weather in Oslo and Bergen?"}]
RESULTS = {"Oslo": "7 degrees", "Bergen": "rain"}
ANSWER = "Oslo: 7 degrees. Bergen: rain."
THOUGHT = "The user asks for the weather."
OFF, ON = {"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with acting(root, weather) as running:
        yield running


def client(server: Server) -> Any:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture
def claude(server: Server) -> Iterator[Any]:
    with client(server) as found:
        yield found


def asked(claude: Any, streaming: bool, messages: list[Any] = QUESTION, **more: Any) -> Any:
    """A message, with or without streaming, put together by the client itself."""
    wanted = {"model": NAME, "max_tokens": 200, "messages": messages, **more}
    if not streaming:
        return claude.messages.create(**wanted)
    with claude.messages.stream(**wanted) as stream:
        return stream.get_final_message()


@pytest.mark.parametrize("thinking", [OFF, ON], ids=["off", "on"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_tool_loop(server: Server, claude: Any, streaming: bool, thinking: Any) -> None:
    """Two calls, their results, and an answer with what the tools said; thinking goes back as it came."""
    messages: list[Any] = list(QUESTION)
    reasons = []
    for _ in range(4):
        answer = asked(claude, streaming, messages, tools=TOOLS, thinking=thinking)
        reasons.append(answer.stop_reason)
        messages.append(
            {
                "role": "assistant",
                "content": [block.model_dump(exclude_none=True) for block in answer.content],
            }
        )
        made = [block for block in answer.content if block.type == "tool_use"]
        if not made:
            break
        results = [
            {"type": "tool_result", "tool_use_id": one.id, "content": RESULTS[one.input["city"]]}
            for one in made
        ]
        messages.append({"role": "user", "content": results})
    assert reasons == ["tool_use", "tool_use", "end_turn"]
    kinds = [[block["type"] for block in message["content"]] for message in messages[1::2]]
    first = ["thinking"] if thinking is ON else []
    assert kinds == [[*first, "text", "tool_use"], [*first, "tool_use"], [*first, "text"]]
    assert messages[-1]["content"][-1]["text"] == ANSWER
    assert messages[1]["content"][-2]["text"] == "Let me see."
    assert messages[1]["content"][-1]["input"] == {"city": "Oslo", "days": [1, 2]}
    if thinking is ON:
        assert all(message["content"][0]["thinking"] == THOUGHT for message in messages[1::2])
        assert server.engine.seen[-1].count(f"<think>{THOUGHT}</think>") == 2
    if not streaming:
        assert answer.mtp["lossless"] and answer.mtp["tokens_per_step"] > 1  # drafts from the text


def test_the_client_s_own_runner(claude: Any) -> None:
    """It first asks the server to keep the conversation, and sends all of it after the refusal."""

    @anthropic.beta_tool
    def get_weather(city: str, days: list[int] | None = None) -> str:
        """The weather in a city.

        Args:
            city: its name.
            days: which days.
        """
        return RESULTS[city]

    runner = claude.beta.messages.tool_runner(
        model="claude-any", max_tokens=200, messages=QUESTION, tools=[get_weather], thinking=OFF
    )
    assert runner.until_done().content[0].text == ANSWER


def test_raw_events(server: Server) -> None:
    """Every block begins, has deltas of its own type, and ends before the next; the arguments are JSON text."""
    body = {"max_tokens": 200, "messages": QUESTION, "tools": TOOLS, "thinking": ON, "stream": True}
    status, text = server.ask("/v1/messages", body)
    events = [
        json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")
    ]
    assert status == 200 and events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    blocks: list[list[Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append([event["content_block"]["type"]])
        if "index" in event:
            assert event["index"] == len(blocks) - 1
            blocks[-1].append(event.get("delta", {}).get("type"))
    assert all(block[1] is None and block[-1] is None for block in blocks)
    assert [(block[0], set(block[2:-1])) for block in blocks] == [
        ("thinking", {"thinking_delta"}),
        ("text", {"text_delta"}),
        ("tool_use", {"input_json_delta"}),
    ]
    (end,) = [event for event in events if event["type"] == "message_delta"]
    assert end["delta"]["stop_reason"] == "tool_use" and end["mtp"]["lossless"] is True


def test_thinking_that_is_hidden_or_cut(claude: Any) -> None:
    for streaming in (False, True):
        hidden = asked(claude, streaming, tools=TOOLS, thinking={"type": "adaptive", "display": "omitted"})
        assert [block.type for block in hidden.content] == ["thinking", "text", "tool_use"]
        assert hidden.content[0].thinking == ""
        cut = asked(claude, streaming, thinking=ON, max_tokens=6)
        assert [block.type for block in cut.content] == ["thinking"] and cut.stop_reason == "max_tokens"
        assert THOUGHT.startswith(cut.content[0].thinking)
    for effort, kind in (("high", "thinking"), ("none", "text")):
        body = {"extra_body": {"output_config": {"effort": effort}}}
        assert asked(claude, False, **body).content[0].type == kind


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "pick"}])
def test_a_call_that_must_be_made(claude: Any, choice: Any) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red"]}}, "required": ["colour"]}
    tools = [{"name": "pick", "input_schema": {**schema, "additionalProperties": False}}]
    choice = {**choice, "disable_parallel_tool_use": True}
    answer = asked(claude, False, tools=tools, tool_choice=choice, max_tokens=1000)
    assert [block.type for block in answer.content] == ["tool_use"] and answer.stop_reason == "tool_use"
    assert answer.content[0].name == "pick" and answer.content[0].input == {"colour": "red"}


def test_only_one_call(root: Path) -> None:
    both = call("get_weather", '{"city": "Oslo"}') + "\n" + call("get_weather", '{"city": "Bergen"}')
    with acting(root, lambda _: both, limits=Limits(thinking="off")) as running, client(running) as claude:
        for single, n_calls in ((True, 1), (False, 2)):
            choice = {"type": "auto", "disable_parallel_tool_use": single}
            answer = asked(claude, False, tools=TOOLS, tool_choice=choice)
            assert [block.type for block in answer.content] == ["tool_use"] * n_calls
        answer = asked(claude, False, tools=TOOLS, stop_sequences=["zzz", "\n<tool_call>"])
        assert (answer.stop_reason, answer.stop_sequence) == ("tool_use", None)


def test_what_the_template_gets(server: Server, claude: Any) -> None:
    """Errors of tools are named, text around results keeps its order, and unknown tools are counted."""
    made = {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Oslo"}}
    hidden = {"type": "redacted_thinking", "data": "xx"}
    result = {
        "type": "tool_result",
        "tool_use_id": "a",
        "is_error": True,
        "content": [{"type": "text", "text": "no"}],
    }
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "The "}, {"type": "text", "text": "weather?"}]},
        {"role": "assistant", "content": [hidden, made]},
        {"role": "user", "content": [result, {"type": "text", "text": "Again"}]},
    ]
    tools = [*TOOLS, {"type": "web_search_20250305", "name": "web_search"}]
    asked(claude, False, talk, tools=tools, system="Be kind.", thinking=OFF)
    seen = server.engine.seen[-1]
    order = [
        "Be kind.",
        "The weather?",
        '"arguments": {"city": "Oslo"}',
        "Error: no</tool_response>",
        "Again",
    ]
    places = [seen.index(text) for text in order]
    assert places == sorted(places) and "web_search" not in seen
    counted = claude.messages.count_tokens(
        model=NAME, messages=talk, tools=tools, system="Be kind.", thinking=OFF
    )
    assert counted.input_tokens == len(server.prompts.tokenizer.encode(seen, add_special_tokens=False))
    assert 'mtp_mlx_ignored_fields_total{field="tools.web_search_20250305"} 1' in server.ask("/metrics")[1]


def said(*blocks: Any, role: str = "assistant") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{}]}, "name must be a string"),
    ({"tools": "x"}, "tools must be a list"),
    ({"tools": [{"name": "x", "input_schema": 5}]}, "JSON schema"),
    ({"tools": [{"type": 5}]}, "tools[0].type must be a string"),
    ({"tool_choice": "auto"}, "tool_choice must be an object"),
    ({"tool_choice": {"type": ["auto"]}}, "tool_choice must be an object"),
    ({"tool_choice": {"type": "any"}}, "tool_choice wants a tool"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "y"}}, "the tool 'y'"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name must be a string"),
    ({"tools": TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, "true or false"),
    ({"thinking": True}, "thinking must be an object"),
    ({"thinking": {"type": "much"}}, "thinking must be an object"),
    ({"thread": {"type": "create"}}, "send the whole conversation"),
    ({"output_config": 5}, "output_config must be an object"),
    ({"output_config": {"effort": "odd"}}, "output_config.effort must be one of"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role must be one of"),
    ({"messages": [{"role": "user"}]}, "content must be a string or a list"),
    (said(5), "blocks of type None"),
    (said({"type": "image"}, role="user"), "blocks of type 'image'"),
    (said({"type": "tool_use", "id": "a"}), "the tool's name"),
    (said({"type": "tool_use", "id": "a", "name": "x", "input": [1]}), "must be a JSON object"),
    (said({"type": "thinking"}), "thinking must be a string"),
    (said({"type": "tool_result", "tool_use_id": "a"}), "blocks of type 'tool_result'"),
    (said({"type": "tool_result", "tool_use_id": 5}, role="user"), "tool_call_id must be a string"),
    (said({"type": "tool_result", "content": [{"type": "text"}]}, role="user"), "must be a string"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_requests(server: Server, change: dict[str, Any], says: str) -> None:
    status, answer = server.ask("/v1/messages", {"messages": QUESTION, "max_tokens": 5, **change})
    message = answer["error"]["message"]
    assert status == 400 and says in message and "\n" not in message
