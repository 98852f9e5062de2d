"""A headless Chromium, driven over a pair of pipes by its own protocol (Chrome DevTools)."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)  # fmt: skip  # noqa: E501
ANSWER_SECONDS = 60.0
READS, WRITES = 3, 4  # file descriptors of the browser's ends


class Page:
    """One tab."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out, self._unread = into, out, b""
        self._number, self._session = 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self) -> bytes:
        while b"\0" not in self._unread:
            assert select.select([self._out], [], [], ANSWER_SECONDS)[0], "the browser does not answer"
            more = os.read(self._out, 1 << 16)
            assert more, "the browser has gone"
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        return message

    def open(self, url: str) -> None:
        """Goes to a page."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self._evaluated(expression)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def _evaluated(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)

    def wait(self, expression: str, seconds: float = 30.0) -> Any:
        """The value of an expression as soon as it is true; one that cannot be evaluated yet is not true yet."""
        end = time.monotonic() + seconds
        while True:
            result = self._evaluated(expression)
            value = result["result"].get("value")
            if value and "exceptionDetails" not in result:
                return value
            assert time.monotonic() < end, (
                f"{expression} stayed {result}; {self.js('document.body.innerText')}"
            )
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Types text where the focus is, as soon as that is a field."""
        self.wait("['TEXTAREA', 'INPUT'].includes(document.activeElement.tagName)")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Presses a key, such as ("Enter", 13)."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )

    def screenshot(self, path: Path) -> None:
        """Writes what is seen to a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """A page of a new browser with its profile in a folder."""
    assert CHROMIUM is not None
    there_read, here_write = os.pipe()
    here_read, there_write = os.pipe()

    def ends() -> None:
        high = [os.dup(there_read), os.dup(there_write)]  # so that neither is overwritten
        for end, wanted in zip(high, (READS, WRITES), strict=True):
            os.dup2(end, wanted)

    process = subprocess.Popen(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "--window-size=1000,900",
        ],
        preexec_fn=ends,
        pass_fds=(READS, WRITES),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(there_read)
    os.close(there_write)
    try:
        yield Page(here_write, here_read)
    finally:
        process.kill()
        process.wait(20)
        os.close(here_write)
        os.close(here_read)
