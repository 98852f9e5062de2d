"""Proves that odd requests of agents are answered where their meaning is clear: an agent cannot do anything about a
400 for a history that it sends again and again. What is left out is counted, and said to the model."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.serve.prompts import Limits
from tests.serve.running import Server
from tests.serve.scripted import acting, agent_tool, save_agent

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TOOL = {"name": "get_weather", "description": "The weather", "parameters": agent_tool()}
OTHER = {"name": "get_time", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": TOOL}, {"type": "function", "function": OTHER}]
ASKED = {"role": "user", "content": "The weather?"}
MADE = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root: Path = save_agent(tmp_path_factory.mktemp("odd"))
    with acting(root, lambda _: "Fine.", limits=Limits(default_output=20, thinking="off")) as running:
        yield running


def seen(server: Server, path: str, body: dict[str, Any]) -> tuple[str, list[str]]:
    """(the prompt, what had no effect)."""
    status, answer = server.ask(path, {"max_tokens": 20, **body} if path == MESSAGES else body)
    assert status == 200, answer
    ignored = [note.split("'")[1] for note in answer["mtp"]["fallbacks"] if note.startswith("the field")]
    return server.engine.seen[-1], ignored


def result_of(content: Any) -> dict[str, Any]:
    """A chat whose tool answered with that."""
    said = {"role": "assistant", "content": None, "tool_calls": [MADE]}
    return {"messages": [ASKED, said, {"role": "tool", "tool_call_id": "a", "content": content}]}


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (None, ""),
        ("7", "7"),
        (["7", "8"], "78"),
        ([{"type": "text", "text": "7"}, {"type": "output_text", "text": "8"}], "78"),
        ({"degrees": 7, "of": "Ö"}, '{"degrees": 7, "of": "Ö"}'),
        ([{"degrees": 7}], '[{"degrees": 7}]'),
        ([], ""),
        (7, "7"),
        (False, "false"),
    ],
)
def test_results_of_any_form(server: Server, content: Any, read: str) -> None:
    for path, body in (
        (CHAT, result_of(content)),
        (RESPONSES, {"input": [ASKED, {"type": "function_call_output", "call_id": "a", "output": content}]}),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": content}]}]},
        ),
    ):
        prompt, ignored = seen(server, path, body)
        assert f"<tool_response>{read}</tool_response>" in prompt and not ignored


def test_pictures_in_results_are_left_out_in_words(server: Server) -> None:
    prompt, ignored = seen(server, CHAT, result_of([{"type": "text", "text": "See: "}, PICTURE]))
    assert "<tool_response>See: [image_url left out: this model reads text only]</tool_response>" in prompt
    assert ignored == ["tool result of type image_url"]
    status, answer = server.ask(CHAT, {"messages": [{"role": "user", "content": [PICTURE]}]})
    assert status == 400 and "image_url" in answer["error"]["message"]  # a person can do something about it


@pytest.mark.parametrize(
    ("path", "body", "read"),
    [
        (
            CHAT,
            {"messages": [{"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]}]},
            "user\nab<",
        ),
        (
            CHAT,
            {
                "messages": [
                    ASKED,
                    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                    ASKED,
                ]
            },
            "assistant\nNo.<",
        ),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "text", "text": "b"}]}]}, "user\nb<"),
        (
            MESSAGES,
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "document", "title": "T", "source": {"type": "text", "data": "long"}},
                            {
                                "type": "search_result",
                                "source": "s",
                                "content": [{"type": "text", "text": "hit"}],
                            },
                            {"type": "text", "text": "b"},
                        ],
                    }
                ]
            },
            "user\nT\nlong\nhit\nb<",
        ),
        (
            RESPONSES,
            {
                "input": [
                    ASKED,
                    {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "x"},
                    {"type": "custom_tool_call_output", "call_id": "c", "output": "done"},
                ]
            },
            '{"name": "patch", "arguments": {"input": "x"}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
            "<tool_response>done<",
        ),
    ],
)
def test_texts_of_any_api(server: Server, path: str, body: dict[str, Any], read: str) -> None:
    prompt, ignored = seen(server, path, body)
    assert read in prompt and not ignored


def test_thinking_inside_the_content(server: Server) -> None:
    said = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Let me see."}]
    talk = [
        ASKED,
        {"role": "assistant", "content": said, "tool_calls": [MADE]},
        {"role": "tool", "content": "7"},
    ]
    assert "<think>Hm.</think>Let me see.<tool_call>" in seen(server, CHAT, {"messages": talk})[0]


def test_what_ran_elsewhere_is_left_out(server: Server) -> None:
    items = [ASKED, {"type": "web_search_call", "id": "w", "status": "completed"}, ASKED]
    assert seen(server, RESPONSES, {"input": items})[1] == ["input.web_search_call"]
    used = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    found = {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}
    talk = [ASKED, {"role": "assistant", "content": [used, found, {"type": "text", "text": "So."}]}, ASKED]
    assert seen(server, MESSAGES, {"messages": talk})[1] == [
        "messages.server_tool_use",
        "messages.web_search_tool_result",
    ]


def test_tools_of_other_kinds_and_forms(server: Server) -> None:
    tools = [{"type": "web_search"}, {"type": "function", **TOOL, "strict": True}]
    prompt, ignored = seen(server, CHAT, {"messages": [ASKED], "tools": tools})
    assert '"function": {"name": "get_weather", "description"' in prompt and ignored == ["tools.web_search"]


@pytest.mark.parametrize(
    ("choice", "shown", "must"),
    [
        ({"type": "auto"}, 2, False),
        ({"type": "none"}, 0, False),
        ("any", 2, True),
        ({"type": "function", "name": "get_time"}, 1, True),
        ({"type": "function", "function": {"name": "get_time"}}, 1, True),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]},
            1,
            False,
        ),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"function": {"name": "get_time"}}]},
            },
            1,
            True,
        ),
    ],
)
def test_choices_of_both_apis(server: Server, choice: Any, shown: int, must: bool) -> None:
    flat = [{"type": "function", **TOOL}, {"type": "function", **OTHER}]
    for path, body in (
        (CHAT, {"messages": [ASKED], "tools": TOOLS}),
        (RESPONSES, {"input": "x", "tools": flat}),
    ):
        limit = {"max_output_tokens" if path == RESPONSES else "max_tokens": 3}
        prompt, _ = seen(server, path, {**body, **limit, "tool_choice": choice})
        assert prompt.count('"function": {') == shown and prompt.endswith("<tool_call>\n") == must


def test_numbers_of_other_servers(server: Server) -> None:
    """-1 turns top-k off, and seeds are signed; bounds are said in numbers that a person can read."""
    assert not seen(server, CHAT, {"messages": [ASKED], "top_k": -1, "seed": -5, "temperature": 1.0})[1]
    status, answer = server.ask(CHAT, {"messages": [ASKED], "max_tokens": 0})
    assert status == 400 and answer["error"]["message"] == "max_tokens must be at least 1, not 0"


def test_paths(server: Server) -> None:
    """Without /v1 as with it; what is not there is said in the form of an error."""
    assert server.ask("/chat/completions", {"messages": [ASKED]})[0] == server.ask("/models")[0] == 200
    for path, body, status in (("/v1/embeddings", {"input": "x"}, 404), (CHAT, None, 405)):
        found, answer = server.ask(path, body)
        assert found == status and path in answer["error"]["message"]


def test_many_interrupted_streams_at_once(server: Server) -> None:
    """Clients that leave in the middle hold up nobody, and leave nothing behind."""
    body = json.dumps({"messages": [ASKED], "stream": True}).encode()

    def leaves(number: int) -> int:
        if number % 3 == 0:
            return server.ask(CHAT, raw=body)[0]
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        if number % 3 == 1:
            connection.getresponse().readline()
        connection.close()
        return 200

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(leaves, range(24))) == {200}
    server.settle()
