"""Proves that the chat window streams from its background thread, stops, remembers, and survives a failed load.

On Toga's dummy backend, with a tiny model.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("toga_dummy")
os.environ.setdefault("TOGA_BACKEND", "toga_dummy")

from examples.chat_app.app import ChatApp  # noqa: E402
from examples.chat_app.engine import ChatEngine, Event  # noqa: E402
from mtp_mlx import generate, load  # noqa: E402
from tests.tiny import save_tiny  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("chat") / "model", seed=3))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path_factory.getbasetemp() / "chat-cache"))


async def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Lets the window work until something is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.005)


def in_a_window(model: str, scenario: Callable[[ChatApp], Awaitable[None]], max_tokens: int = 12) -> None:
    """Opens the app in a running loop, runs the scenario, and closes it."""

    async def whole() -> None:
        app = ChatApp(model, None)
        app.engine.max_tokens = max_tokens
        try:
            await scenario(app)
        finally:
            app.engine.close()
        assert not app.engine._thread.is_alive()

    asyncio.run(whole())


def expected(model: str, messages: list[dict[str, str]], max_tokens: int) -> str:
    """The text that the package writes for the conversation."""
    attached, tokenizer = load(model, None)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(attached, tokenizer, list(ids["input_ids"] if hasattr(ids, "keys") else ids), max_tokens)


def test_it_streams_and_remembers_the_conversation(model: str) -> None:
    seen: list[str] = []

    async def scenario(app: ChatApp) -> None:
        assert "Loading" in app.status.text and not app.send_button.enabled
        app.question.value = "too early"
        app.send()
        assert app.transcript.value == ""
        await until(lambda: app.send_button.enabled)
        assert app.status.text == f"{model} is ready"
        for question in ("The sky", "The dog"):
            app.question.value = question
            app.send()
            assert app.question.value == "" and app.stop_button.enabled and not app.send_button.enabled
            while not app.send_button.enabled:
                seen.append(app.transcript.value)
                await asyncio.sleep(0)
            assert "12 tokens, " in app.status.text and not app.stop_button.enabled
        asked = [{"role": "user", "content": "The sky"}]
        first = expected(model, asked, 12)
        asked += [{"role": "assistant", "content": first}, {"role": "user", "content": "The dog"}]
        second = expected(model, asked, 12)
        assert (
            app.transcript.value == f"You: The sky\n\nModel: {first}\n\nYou: The dog\n\nModel: {second}\n\n"
        )
        assert [message["role"] for message in app.engine.messages] == ["user", "assistant"] * 2

    in_a_window(model, scenario)
    assert len(set(seen)) > 6  # it grew piece by piece


def test_stop_ends_the_answer_and_the_next_question_is_answered(model: str) -> None:
    async def scenario(app: ChatApp) -> None:
        await until(lambda: app.send_button.enabled)
        app.question.value = "The sky"
        app.send()
        await until(lambda: len(app.transcript.value) > len("You: The sky\n\nModel: ") + 3)
        app.stop()
        await until(lambda: app.send_button.enabled)
        assert app.status.text.startswith("stopped, ")
        written = app.engine.messages[-1]["content"]
        assert app.transcript.value == f"You: The sky\n\nModel: {written}\n\n" and len(written) < 4000
        app.engine.max_tokens = 5
        app.question.value = "again"
        app.send()
        await until(lambda: app.send_button.enabled)
        assert app.status.text.startswith("5 tokens")

    in_a_window(model, scenario, max_tokens=100_000)


def test_a_failed_load_is_a_sentence_and_another_model_can_follow(model: str, tmp_path: Path) -> None:
    async def scenario(app: ChatApp) -> None:
        await until(lambda: "Loading" not in app.status.text)
        assert "no model" in app.status.text and not app.send_button.enabled and not app.stop_button.enabled
        app.question.value = "hello"
        app.send()
        assert app.question.value == "hello"  # nothing is sent, nothing is lost
        app.engine.load(model, None)
        await until(lambda: app.send_button.enabled)
        app.send()
        await until(lambda: "tokens" in app.status.text)

    in_a_window(str(tmp_path / "nowhere" / "at" / "all"), scenario)


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(model: str) -> None:
    events: list[Event] = []
    happened = threading.Event()

    def tell(event: Event) -> None:
        events.append(event)
        if event.kind != "text":
            happened.set()

    engine = ChatEngine(tell, max_tokens=4)
    engine.ask("too early")
    assert happened.wait(60) and events[-1] == Event("failed", "no model is loaded")
    for call in (lambda: engine.load(model, None), lambda: engine.ask("a"), lambda: engine.ask("é" * 3)):
        happened.clear()
        call()
        assert happened.wait(120)
    assert [event.kind for event in events if event.kind != "text"][:3] == ["failed", "loaded", "done"]
    engine.close()
    assert len(engine.messages) in (2, 4)
