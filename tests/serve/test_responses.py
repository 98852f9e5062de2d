"""Proves that the unmodified `openai` client runs a tool loop over /v1/responses, streaming and not, with thinking;
and that what a server without memory cannot do is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.serve.prompts import Limits
from tests.serve.running import NAME, Server
from tests.serve.scripted import acting, agent_tool, call, save_agent, weather

openai = pytest.importorskip("openai")

TOOLS = [
    {"type": "function", "name": "get_weather", "description": "The weather", "parameters": agent_tool()}
]
QUESTION = {"role": "user", "content": "The weather in Oslo and Bergen?"}
RESULTS = {"Oslo": "7 degrees", "Bergen": "rain"}
ANSWER = "Oslo: 7 degrees. Bergen: rain."
THOUGHT = "The user asks for the weather."
OFF, ON = {"effort": "none"}, {"effort": "high"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with acting(root, weather) as running:
        yield running


def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def gpt(server: Server) -> Iterator[Any]:
    with client(server) as found:
        yield found


def asked(gpt: Any, streaming: bool, **wanted: Any) -> Any:
    """A response, with or without streaming, put together by the client itself."""
    if not streaming:
        return gpt.responses.create(model=NAME, **wanted)
    with gpt.responses.stream(model=NAME, **wanted) as stream:
        return stream.get_final_response()


@pytest.mark.parametrize("reasoning", [OFF, ON], ids=["off", "on"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_tool_loop(server: Server, gpt: Any, streaming: bool, reasoning: Any) -> None:
    """Two calls, their results, and an answer with what the tools said; reasoning goes back as it came."""
    items: list[Any] = [QUESTION]
    kinds = []
    for _ in range(4):
        answer = asked(gpt, streaming, input=items, tools=TOOLS, reasoning=reasoning, instructions="Be kind.")
        assert answer.status == "completed" and answer.error is None
        kinds.append([item.type for item in answer.output])
        items += [item.model_dump(exclude_none=True) for item in answer.output]
        made = [item for item in answer.output if item.type == "function_call"]
        if not made:
            break
        for one in made:
            city = json.loads(one.arguments)["city"]
            items.append({"type": "function_call_output", "call_id": one.call_id, "output": RESULTS[city]})
    first = ["reasoning"] if reasoning is ON else []
    assert kinds == [[*first, "message", "function_call"], [*first, "function_call"], [*first, "message"]]
    assert answer.output_text == ANSWER
    seen = server.engine.seen[-1]
    assert "Be kind." in seen and seen.count("<tool_response>") == 2 and "Let me see." in seen
    assert seen.count(f"<think>{THOUGHT}</think>") == 2 * len(first)
    assert seen.count("<|im_start|>assistant") == 3  # reasoning, text and call of a turn are one message
    if not streaming:
        assert answer.mtp["lossless"] and answer.mtp["tokens_per_step"] > 1  # drafts from the text


def test_raw_events(server: Server) -> None:
    """Numbered; every item is added and done, and so is its part; deltas add up to what is done."""
    body = {"input": [QUESTION], "tools": TOOLS, "reasoning": ON, "stream": True}
    status, text = server.ask("/v1/responses", body)
    events = [
        json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")
    ]
    assert status == 200 and [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i] or not kind.endswith(".delta")]
    part = ["content_part.added", "{}.delta", "{}.done", "content_part.done"]
    assert deltas == [
        "created",
        "in_progress",
        *["output_item.added", *(name.format("reasoning_text") for name in part), "output_item.done"],
        *["output_item.added", *(name.format("output_text") for name in part), "output_item.done"],
        *[
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
        ],
        "completed",
    ]
    for name in ("reasoning_text", "output_text", "function_call_arguments"):
        written = "".join(event["delta"] for event in events if event["type"] == f"response.{name}.delta")
        (done,) = [event for event in events if event["type"] == f"response.{name}.done"]
        assert written and written == done.get("text", done.get("arguments"))
    final = events[-1]["response"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert final["output"] == done and final["mtp"]["lossless"] is True
    usage = final["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]


@pytest.mark.parametrize("streaming", [False, True])
def test_cut_and_plain_text(gpt: Any, streaming: bool) -> None:
    wanted = {"input": "The weather?", "reasoning": ON, "max_output_tokens": 6}
    if streaming:
        events = list(gpt.responses.create(model=NAME, **wanted, stream=True))
        assert events[-1].type == "response.incomplete"
        cut = events[-1].response
    else:
        cut = asked(gpt, False, **wanted)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert [item.type for item in cut.output] == ["reasoning"] and cut.output_text == ""
    assert THOUGHT.startswith(cut.output[0].content[0].text) and cut.output[0].status == "incomplete"


def test_a_call_that_must_be_made_and_a_schema(gpt: Any) -> None:
    colour = {"type": "object", "properties": {"colour": {"enum": ["red"]}}, "required": ["colour"]}
    colour["additionalProperties"] = False
    tools = [*TOOLS, {"type": "function", "name": "pick", "parameters": colour, "strict": True}]
    for choice in ({"type": "function", "name": "pick"}, "required"):
        offered = tools if isinstance(choice, dict) else tools[1:]
        answer = asked(gpt, False, input="x", tools=offered, tool_choice=choice, max_output_tokens=1000)
        (made,) = answer.output
        assert (made.name, json.loads(made.arguments)) == ("pick", {"colour": "red"})
    form = {"type": "json_schema", "name": "colour", "schema": colour}
    answer = asked(gpt, False, input="x", reasoning=OFF, text={"format": form}, max_output_tokens=1000)
    assert json.loads(answer.output_text) == {"colour": "red"}


def test_one_call_and_tools_that_are_no_functions(root: Path) -> None:
    both = call("get_weather", '{"city": "Oslo"}') + "\n" + call("get_weather", '{"city": "Bergen"}')
    with acting(root, lambda _: both, limits=Limits(thinking="off")) as running, client(running) as gpt:
        for parallel, n_calls in ((False, 1), (True, 2)):
            tools = [*TOOLS, {"type": "web_search"}]
            answer = asked(gpt, False, input="x", tools=tools, parallel_tool_calls=parallel)
            assert [item.type for item in answer.output] == ["function_call"] * n_calls
        assert "web_search" not in running.engine.seen[-1]
        assert 'mtp_mlx_ignored_fields_total{field="tools.web_search"} 2' in running.ask("/metrics")[1]


def test_items_from_elsewhere(server: Server, gpt: Any) -> None:
    """Developers' messages, summaries of reasoning, reasoning that nobody can read, results in parts."""
    made = {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": '{"city": "Oslo"}'}
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        QUESTION,
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]},
        made,
        {**made, "call_id": "b", "arguments": '{"city": "Bergen"}'},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "function_call_output", "call_id": "a", "output": "7 degrees"},
        {"type": "reasoning", "summary": [], "encrypted_content": "xx"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "So."}]},
    ]
    asked(gpt, False, input=items, tools=TOOLS, reasoning=OFF)
    seen = server.engine.seen[-1]
    order = [
        "<|im_start|>system\nBe brief.",
        "<think>Hm</think>",
        '"Oslo"',
        '"Bergen"',
        "rain",
        "7 degrees",
        "So.",
    ]
    places = [seen.index(text) for text in order]
    assert places == sorted(places) and seen.count("<|im_start|>assistant") == 3


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "send the whole conversation"),
    ({"conversation": "conv_1"}, "send the whole conversation"),
    ({"background": True}, "keeps no responses"),
    ({"input": None}, "input must be a list"),
    ({"input": []}, "input must be a list"),
    ({"input": [5]}, "input[0] must be an object"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "items of type 'item_reference'"),
    ({"input": [{"role": "tool", "content": "x"}]}, "role must be one of"),
    ({"input": [{"role": "user", "content": 5}]}, "must be a string or a list"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "not 'input_image'"),
    ({"input": [{"type": "function_call", "call_id": "a"}]}, "the tool's name"),
    ({"input": [{"type": "function_call", "name": "x", "arguments": "{"}]}, "not JSON"),
    ({"input": [{"type": "function_call_output", "call_id": 5}]}, "input[0].tool_call_id must be"),
    ({"tools": [{"name": "x"}]}, "tools[0].type must be a string"),
    ({"tools": [{"type": "function"}]}, "name must be a string"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "names a function"),
    ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice must be"),
    ({"tool_choice": "required"}, "tool_choice wants a tool"),
    ({"reasoning": 5}, "reasoning must be an object"),
    ({"reasoning": {"effort": "odd"}}, "reasoning.effort must be one of"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type must be"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format: the schema"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"instructions": 5}, "instructions must be a string"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_requests(server: Server, change: dict[str, Any], says: str) -> None:
    status, answer = server.ask("/v1/responses", {"input": "x", **change})
    message = answer["error"]["message"]
    assert status == 400 and says in message and "\n" not in message
