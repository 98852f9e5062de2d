"""The window: a transcript, an input line, "Send" and "Stop". The model runs on its own thread (`engine.py`)."""

from __future__ import annotations

from typing import Any

import toga
from toga.style import Pack

from examples.chat_app.engine import ChatEngine, Event


class ChatApp(toga.App):
    """A chat with one model.

    Args:
        model: embedded model, mlx-lm folder or hub id.
        adapter: adapter folder, "auto", or None for none.
    """

    def __init__(self, model: str = "smollm2-135m", adapter: str | None = "auto", **kwargs: Any) -> None:
        self._model_name, self._adapter = model, adapter
        super().__init__(formal_name="mtp-mlx chat", app_id="org.mtp-mlx.chat", **kwargs)

    def startup(self) -> None:
        """Build the window and start loading the model."""
        self.transcript = toga.MultilineTextInput(readonly=True, style=Pack(flex=1))
        self.question = toga.TextInput(placeholder="Ask something", on_confirm=self.send, style=Pack(flex=1))
        self.send_button = toga.Button("Send", on_press=self.send, enabled=False)
        self.stop_button = toga.Button("Stop", on_press=self.stop, enabled=False)
        self.status = toga.Label(f"Loading {self._model_name} ...")
        line = toga.Box(children=[self.question, self.send_button, self.stop_button])
        content = toga.Box(
            children=[self.transcript, line, self.status], style=Pack(direction="column", margin=8, gap=6)
        )
        self.main_window = toga.MainWindow(title=self.formal_name, size=(640, 480))
        self.main_window.content = content
        self.main_window.show()
        self.engine = ChatEngine(tell=self._from_engine)
        self.on_exit = self._close
        self.engine.load(self._model_name, self._adapter)

    def send(self, widget: Any = None, **kwargs: Any) -> None:
        """Send the question to the model."""
        text = (self.question.value or "").strip()
        if not text or not self.send_button.enabled:
            return
        self.question.value = ""
        self._add(f"You: {text}\n\nModel: ")
        self.send_button.enabled, self.stop_button.enabled = False, True
        self.status.text = "Writing ..."
        self.engine.ask(text)

    def stop(self, widget: Any = None, **kwargs: Any) -> None:
        """Stop the answer at the next token."""
        self.stop_button.enabled = False
        self.engine.stop()

    def _from_engine(self, event: Event) -> None:
        """Called on the background thread: pass the event to the main thread, which owns the widgets."""
        self.loop.call_soon_threadsafe(self._show, event)

    def _show(self, event: Event) -> None:
        if event.kind == "text":
            self._add(event.text)
            return
        was_writing = self.stop_button.enabled or self.status.text == "Writing ..."
        self.stop_button.enabled = False
        if event.kind == "failed":
            self.send_button.enabled = was_writing  # after a failed load there is no model to ask
            self.status.text = event.text
            return
        self.send_button.enabled = True
        if event.kind == "done":
            self._add("\n\n")
        self.status.text = f"{event.text} is ready" if event.kind == "loaded" else event.text

    def _add(self, text: str) -> None:
        self.transcript.value = (self.transcript.value or "") + text
        self.transcript.scroll_to_bottom()

    def _close(self, *args: Any, **kwargs: Any) -> bool:
        self.engine.close()
        return True
