"""Proves that the unmodified `openai` client runs a tool loop against the server, streaming and not, drafting on; and
what becomes of tool calls that are wrong, cut or not allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.serve.prompts import Limits
from tests.serve.running import NAME, Server
from tests.serve.scripted import TEMPLATE, acting, agent_tool, call, save_agent, weather

openai = pytest.importorskip("openai")

WEATHER = {"name": "get_weather", "description": "The weather in a city", "parameters": agent_tool()}
TOOLS = [{"type": "function", "function": WEATHER}]
QUESTION = [{"role": "user", "content": "The weather in Oslo and Bergen?"}]
RESULTS = {"Oslo": "7 degrees", "Bergen": "rain"}
MADE = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
AS_TEXT = (  # a template that joins the arguments to a text
    '{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}',
    "{{ made.function.name + ' ' + made.function.arguments }}",
)
ANSWER = "Oslo: 7 degrees. Bergen: rain."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with acting(root, weather, limits=Limits(default_output=200, thinking="off")) as running:
        yield running


@pytest.fixture
def gpt(server: Server) -> Iterator[Any]:
    with client(server) as found:
        yield found


def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def asked(gpt: Any, streaming: bool, messages: list[Any], **more: Any) -> Any:
    """A chat completion, with or without streaming, put together by the client itself."""
    wanted = {"model": NAME, "messages": messages, **more}
    if not streaming:
        return gpt.chat.completions.create(**wanted)
    with gpt.chat.completions.stream(**wanted) as stream:
        return stream.get_final_completion()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tool_loop(gpt: Any, streaming: bool) -> None:
    """Two calls, their results, and an answer with what the tools said."""
    messages: list[Any] = list(QUESTION)
    reasons, mtp = [], []
    for _ in range(4):
        answer = asked(gpt, streaming, messages, tools=TOOLS)
        choice = answer.choices[0]
        reasons.append(choice.finish_reason)
        if not streaming:
            mtp.append(answer.mtp)
        messages.append(choice.message.model_dump(exclude_none=True))
        if not choice.message.tool_calls:
            break
        for made in choice.message.tool_calls:
            city = json.loads(made.function.arguments)["city"]
            messages.append({"role": "tool", "tool_call_id": made.id, "content": RESULTS[city]})
    assert reasons == ["tool_calls", "tool_calls", "stop"]
    assert messages[1]["content"] == "Let me see." and messages[-1]["content"] == ANSWER
    made = messages[1]["tool_calls"][0]
    assert made["type"] == "function" and made["function"]["name"] == "get_weather"
    assert json.loads(made["function"]["arguments"]) == {"city": "Oslo", "days": [1, 2]}
    assert not messages[3].get("content") and messages[3]["tool_calls"][0]["id"] != made["id"]
    if not streaming:  # the client's own accumulator drops fields that it does not know
        assert all(one["lossless"] for one in mtp) and mtp[-1]["tokens_per_step"] > 1  # drafts from the text


def test_the_model_sees_tools_and_results(server: Server, gpt: Any) -> None:
    made = {
        "id": "a",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
    }
    talk = [*QUESTION, {"role": "assistant", "tool_calls": [made]}]
    talk.append({"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "7 degrees"}]})
    asked(gpt, False, talk, tools=TOOLS)
    seen = server.engine.seen[-1]
    assert '"description": "The weather in a city"' in seen
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in seen
    assert "<tool_response>7 degrees</tool_response>" in seen


def test_raw_events_of_a_call(gpt: Any) -> None:
    """The id and the name once, then the arguments; text before them; the reason and `mtp` last."""
    chunks = list(gpt.chat.completions.create(model=NAME, messages=QUESTION, tools=TOOLS, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    made = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert [part.index for part in made] == [0] * len(made) and len(made) >= 2
    assert made[0].id and made[0].function.name == "get_weather" and made[0].function.arguments == ""
    assert all(part.id is None and part.function.name is None for part in made[1:])
    assert chunks[-1].choices[0].finish_reason == "tool_calls" and chunks[-1].mtp["lossless"] is True


def test_without_tools_a_call_is_text(gpt: Any) -> None:
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = asked(gpt, False, QUESTION, **more)
        assert answer.choices[0].message.tool_calls is None and answer.choices[0].finish_reason == "stop"
        assert "<tool_call>" in answer.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pick"}}])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_call_that_must_be_made(server: Server, gpt: Any, choice: Any, streaming: bool) -> None:
    """The random model itself, held to the tools' parameters."""
    colour = {"$ref": "#/$defs/colour"}
    schema = {"type": "object", "properties": {"colour": colour}, "required": ["colour"]}
    schema |= {"additionalProperties": False, "$defs": {"colour": {"enum": ["red", "blue"]}}}
    tools = [{"type": "function", "function": {"name": "pick", "parameters": schema}}]
    others = TOOLS if isinstance(choice, dict) else []
    more = {"tools": [*others, *tools], "tool_choice": choice, "temperature": 1.0, "seed": 4}
    answer = asked(gpt, streaming, QUESTION, **more)
    (made,) = answer.choices[0].message.tool_calls
    assert made.function.name == "pick" and answer.choices[0].finish_reason == "tool_calls"
    assert json.loads(made.function.arguments)["colour"] in ("red", "blue")
    seen = server.engine.seen[-1]
    assert seen.endswith("</think>\n\n<tool_call>\n") and '"pick"' in seen and "get_weather" not in seen


def test_wrong_and_cut_calls(root: Path) -> None:
    """A call that cannot be read, and one that the limit cuts, are text and counted; none of their text is lost."""
    broken = 'Hm. <tool_call>\n{"name": "get_weather", "arguments": {"ci\n</tool_call>'
    scripts = [broken, call("get_weather", '{"city": "Oslo"}'), call("get_weather", "[1]"), "a <tool"]
    with (
        acting(root, lambda prompt: scripts[int(prompt.split("No. ")[1][0])]) as running,
        client(running) as gpt,
    ):

        def ask(number: int, **more: Any) -> Any:
            messages = [{"role": "user", "content": f"No. {number}"}]
            extra = {"chat_template_kwargs": {"enable_thinking": False}}
            return asked(gpt, False, messages, tools=TOOLS, extra_body=extra, **more)

        answer = ask(0)
        assert answer.choices[0].message.content == broken and answer.choices[0].finish_reason == "stop"
        assert any("could not be read" in note for note in answer.mtp["fallbacks"])
        cut = ask(1, max_tokens=20).choices[0]
        assert cut.finish_reason == "length" and cut.message.tool_calls is None
        assert cut.message.content.startswith('<tool_call>\n{"name"')
        assert ask(2).choices[0].message.content == scripts[2]  # arguments that are no object
        assert ask(3).choices[0].message.content == "a <tool"
        running.settle()
        metrics = running.ask("/metrics")[1]
    assert "mtp_mlx_unread_tool_calls_total 3" in metrics and "mtp_mlx_tool_calls_total 0" in metrics


def test_several_calls_at_once(root: Path) -> None:
    """As many as the model writes, or the first one if the request allows one; the text then ends behind it."""
    both = call("get_weather", '{"city": "Oslo"}') + "\n" + call("get_weather", '{"city": "Bergen"}')
    with acting(root, lambda _: both, limits=Limits(thinking="off")) as running, client(running) as gpt:
        for streaming in (False, True):
            answer = asked(gpt, streaming, QUESTION, tools=TOOLS)
            made = answer.choices[0].message.tool_calls
            assert [json.loads(one.function.arguments)["city"] for one in made] == ["Oslo", "Bergen"]
            assert len({one.id for one in made}) == 2 and answer.choices[0].message.content in (None, "")
            first = asked(gpt, streaming, QUESTION, tools=TOOLS, parallel_tool_calls=False)
            (made,) = first.choices[0].message.tool_calls
            assert json.loads(made.function.arguments) == {"city": "Oslo"}
            assert first.choices[0].finish_reason == "tool_calls"
        one = gpt.chat.completions.create(
            model=NAME, messages=QUESTION, tools=TOOLS, parallel_tool_calls=False
        )
        two = gpt.chat.completions.create(model=NAME, messages=QUESTION, tools=TOOLS)
        assert one.usage.completion_tokens < two.usage.completion_tokens


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": {}}, "tools must be a list"),
    ({"tools": [{}]}, "tools[0] must have a function"),
    ({"tools": [5]}, "tools[0] must be an object"),
    ({"tools": [{"type": 5}]}, "tools[0].type must be a string"),
    ({"tools": [{"type": "function", "function": {}}]}, "name must be a string"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "name must have 1 to"),
    ({"tools": [{"type": "function", "function": {"name": "x", "parameters": []}}]}, "JSON schema"),
    ({"tools": [{"type": "function", "function": {"name": "x", "description": 5}}]}, "description"),
    ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice must be"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "y"}}}, "the tool 'y'"),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude"),
    ({"tool_choice": "required"}, "tool_choice wants a tool"),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"functions": [{"name": "x"}]}, "use tools"),
    ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "tool_calls must be a list"),
    ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "tool_calls[0]"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "tool_calls[0]"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "only an assistant's"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 5}]}, "tool_call_id"),
]


def with_arguments(name: Any, arguments: Any) -> dict[str, Any]:
    made = {"id": "a", "function": {"name": name, "arguments": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [made]}]}


WRONG += [
    (with_arguments("x", "{"), "the arguments are not JSON"),
    (with_arguments("x", "[1]"), "must be a JSON object"),
    (with_arguments("x", 5), "must be a JSON object"),
    (with_arguments("", "{}"), "the tool's name"),
    (with_arguments(None, "{}"), "the tool's name"),
    (with_arguments("x", '{"a":' * 9000), "the arguments are not JSON"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_requests(server: Server, change: dict[str, Any], says: str) -> None:
    status, answer = server.ask("/v1/chat/completions", {"messages": QUESTION, **change})
    message = answer["error"]["message"]
    assert status == 400 and says in message and "\n" not in message


def test_a_model_without_tools_says_so(tmp_path: Path) -> None:
    from tests.serve.running import save_model, serving

    with serving(save_model(tmp_path)) as plain:
        status, answer = plain.ask("/v1/chat/completions", {"messages": QUESTION, "tools": TOOLS})
    assert status == 400 and "cannot call tools" in answer["error"]["message"]


def test_loops_at_the_same_time_share_passes(root: Path) -> None:
    """And each gets the texts and calls that it gets alone."""
    with acting(root, weather, limits=Limits(default_output=200, thinking="off")) as running:

        def first(number: int) -> Any:
            with client(running) as gpt:
                asked_twice = [{"role": "user", "content": f"{number}. " + QUESTION[0]["content"]}]
                return asked(gpt, number % 2 == 0, asked_twice, tools=TOOLS).choices[0]

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(first, range(8)))
        running.settle()
        shared = running.engine.metrics.value("mtp_mlx_batched_passes_total")
    assert shared > 0
    for choice in found:
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Oslo", "days": [1, 2]}


def test_templates_that_want_arguments_as_text(tmp_path: Path) -> None:
    """As DeepSeek V3.1's, which joins them to a text."""
    template = TEMPLATE.replace(*AS_TEXT)
    assert template != TEMPLATE
    talk = [*QUESTION, {"role": "assistant", "tool_calls": [MADE]}]
    with acting(save_agent(tmp_path, template), weather) as running:
        status, answer = running.ask("/v1/chat/completions", {"messages": talk})
        assert status == 200 and not answer["mtp"]["fallbacks"]
        assert 'get_weather {"city": "Oslo"}' in running.engine.seen[-1]


@pytest.mark.parametrize("as_text", [False, True])
def test_templates_that_want_one_system_message(tmp_path: Path, as_text: bool) -> None:
    """As Qwen3.5's; the response says that they were joined. What no form mends is said as the template says it."""
    refuses = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    refuses += "{{ raise_exception('system at the beginning') }}{% endif %}"
    refuses += "{% if m.content == 'never' %}{{ raise_exception('not this') }}{% endif %}{% endfor %}"
    template = refuses + (TEMPLATE.replace(*AS_TEXT) if as_text else TEMPLATE)
    kind, brief, quick = ({"role": "system", "content": f"Be {how}."} for how in ("kind", "brief", "quick"))
    talk = [
        kind,
        {**brief, "role": "developer"},
        *QUESTION,
        {"role": "assistant", "tool_calls": [MADE]},
        quick,
    ]
    with acting(save_agent(tmp_path, template), weather) as running:
        status, answer = running.ask("/v1/chat/completions", {"messages": talk})
        assert status == 200 and any("one system message" in note for note in answer["mtp"]["fallbacks"])
        joined = "<|im_start|>system\nBe kind.\n\nBe brief.\n\nBe quick.<|im_end|>"
        assert running.engine.seen[-1].startswith(joined)
        status, answer = running.ask("/v1/chat/completions", {"messages": [kind, *QUESTION]})
        assert status == 200 and not answer["mtp"]["fallbacks"]
        talk.append({"role": "user", "content": "never"})
        status, answer = running.ask("/v1/chat/completions", {"messages": talk})
        assert status == 400 and "system at the beginning" in answer["error"]["message"]


def test_a_long_call_keeps_the_connection_awake(
    server: Server, gpt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comments between events, which the client skips."""
    monkeypatch.setattr("mtp_mlx.serve.app.QUIET_SECONDS", 0.0)
    body = {"messages": QUESTION, "tools": TOOLS, "stream": True}
    lines = server.ask("/v1/chat/completions", body)[1].splitlines()
    assert {line for line in lines if line and not line.startswith("data: ")} == {": still writing"}
    assert asked(gpt, True, QUESTION, tools=TOOLS).choices[0].finish_reason == "tool_calls"


def test_a_call_that_must_be_made_ends_thinking_without_a_switch(tmp_path: Path) -> None:
    """The template always opens thinking; the server closes it, and has nothing to remark."""
    template = TEMPLATE.replace("enable_thinking is defined and enable_thinking", "true")
    schema = {"type": "object", "properties": {"colour": {"enum": ["red"]}}, "additionalProperties": False}
    tools = [
        {"type": "function", "function": {"name": "pick", "parameters": {**schema, "required": ["colour"]}}}
    ]
    with acting(save_agent(tmp_path, template), weather) as running, client(running) as gpt:
        answer = asked(gpt, False, QUESTION, tools=tools, tool_choice="required", max_tokens=1000)
        assert running.engine.seen[-1].endswith("<think>\n</think>\n\n<tool_call>\n")
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"colour": "red"}'
    assert not answer.mtp["fallbacks"] and not hasattr(answer.choices[0].message, "reasoning_content")
