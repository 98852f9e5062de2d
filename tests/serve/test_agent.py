"""Proves that smolagents, an unmodified agent framework, runs its tool loop against the server, streaming and not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.serve.prompts import Limits
from tests.serve.running import NAME, Server
from tests.serve.scripted import acting, save_agent

smolagents = pytest.importorskip("smolagents")

RESULTS = {"Oslo": "7 degrees", "Bergen": "rain"}
ANSWER = "Oslo: 7 degrees. Bergen: rain."


def judged(prompt: str) -> str:
    """Asks for each city's weather, then answers; calls only, since the framework wants one in every step."""
    assert prompt.endswith("<tool_call>\n"), prompt[-80:]
    missing = [city for city, weather in RESULTS.items() if f"Observation:\n{weather}" not in prompt]
    if missing:
        return f'{{"name": "get_weather", "arguments": {{"city": "{missing[0]}"}}}}'
    return f'{{"name": "final_answer", "arguments": {{"answer": "{ANSWER}"}}}}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root: Path = save_agent(tmp_path_factory.mktemp("agent"))
    with acting(root, judged, limits=Limits(default_output=200), strict=True) as running:
        yield running


def an_agent(server: Server, asked: list[str], streaming: bool) -> Any:
    """An agent with one tool, which notes what it was asked."""

    tool = smolagents.tool

    @tool
    def get_weather(city: str) -> str:
        """The weather in a city.

        Args:
            city: its name
        """
        asked.append(city)
        return RESULTS[city]

    model = smolagents.OpenAIModel(
        NAME, api_base=f"{server.url}/v1", api_key="none", client_kwargs={"max_retries": 0}
    )
    return smolagents.ToolCallingAgent(
        tools=[get_weather], model=model, max_steps=4, stream_outputs=streaming, verbosity_level=0
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_an_agent_finds_its_answer(server: Server, streaming: bool) -> None:
    asked: list[str] = []
    agent = an_agent(server, asked, streaming)
    question = "The weather in Oslo and Bergen?"
    if streaming:
        steps = list(agent.run(question, stream=True))
        answer = steps[-1].output
        assert sum(type(step).__name__ == "ChatMessageStreamDelta" for step in steps) > 3
    else:
        answer = agent.run(question)
    assert asked == ["Oslo", "Bergen"] and answer == ANSWER
    used = agent.monitor.get_total_token_counts()
    assert used.input_tokens > 1000 and used.output_tokens > 60
