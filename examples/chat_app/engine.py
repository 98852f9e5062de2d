"""The model behind the chat window: a background thread that loads it and answers, and can be stopped.

It does not depend on any user interface. Everything that happens is reported as an `Event` to a function that is
called on the background thread; the user interface passes it on to its own thread. MLX arrays stay on the thread
that made them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, str]


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        kind: "loaded", "failed" (loading or answering failed), "text" (a piece of the answer), or "done" (the
        answer is
            complete or was stopped).
        text: the piece of text, the error message, or a line of statistics.
    """

    kind: Literal["loaded", "failed", "text", "done"]
    text: str = ""


@dataclass
class ChatEngine:
    """Loads a model and answers on its own thread.

    Attributes:
        tell: called with every event, on the background thread.
        max_tokens: most tokens of an answer.
        messages: the conversation so far.
    """

    tell: Callable[[Event], None]
    max_tokens: int = 400
    messages: list[Message] = field(default_factory=list)
    _work: queue.Queue[Callable[[], None] | None] = field(default_factory=queue.Queue)
    _stop: threading.Event = field(default_factory=threading.Event)
    _model: Any = None
    _tokenizer: Any = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def load(self, model: str, adapter: str | None = "auto") -> None:
        """Load a model in the background, in place of the current one."""
        self._work.put(lambda: self._load(model, adapter))

    def ask(self, text: str) -> None:
        """Answer in the background: "text" events, then one "done" or "failed"."""
        self._stop.clear()
        self._work.put(lambda: self._answer(text))

    def stop(self) -> None:
        """Stop the answer at the next token; what was written stays in the conversation."""
        self._stop.set()

    def close(self) -> None:
        """Stop the thread after the current token."""
        self.stop()
        self._work.put(None)
        self._thread.join()

    # --- on the background thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            try:
                job()
            except Exception as error:  # report it; the thread keeps running
                self.tell(Event("failed", str(error) or type(error).__name__))

    def _load(self, model: str, adapter: str | None) -> None:
        from mtp_mlx import load  # needs MLX, which takes a moment to import

        self._model = self._tokenizer = None
        self._model, self._tokenizer = load(model, adapter)
        self.messages.clear()
        self.tell(Event("loaded", model))

    def _answer(self, text: str) -> None:
        from mtp_mlx import MTPError, stream_generate

        if self._model is None:
            raise MTPError("no model is loaded")
        asked = [*self.messages, {"role": "user", "content": text}]
        written, last = "", None
        responses = stream_generate(self._model, self._tokenizer, self._prompt(asked), self.max_tokens)
        with closing(responses):
            for last in responses:
                written += last.text
                if last.text:
                    self.tell(Event("text", last.text))
                if self._stop.is_set():
                    break
        self.messages[:] = [*asked, {"role": "assistant", "content": written}]
        steps = max(last.stats.steps, 1) if last else 1
        tokens = last.generation_tokens if last else 0
        stopped = "stopped, " if self._stop.is_set() else ""
        self.tell(Event("done", f"{stopped}{tokens} tokens, {tokens / steps:.2f} per pass"))

    def _prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of the conversation in the model's chat template, or of the joined texts if it has none."""
        from mtp_mlx.chat_template import chat_ids

        if not self._tokenizer.has_chat_template:
            return list(self._tokenizer.encode("\n".join(message["content"] for message in messages)))
        return chat_ids(self._tokenizer, messages)
