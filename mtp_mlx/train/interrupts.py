"""Ctrl-C in a training run: the first press ends it after the step, the second one at once."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 0.5  # seconds that the main thread has to end by itself
QUESTION, ANSWER, END = b"\xfd", b"\xfe", b"\xff"  # in pipes; no signal has such a number
ANSWER_SECONDS = 1.0  # more than a question ever waits


@contextmanager
def interruptible(
    asked: threading.Event, tell: Callable[[], None], end: Callable[[], None] | None = None
) -> Iterator[None]:
    """Sets `asked` at the first SIGINT or SIGTERM inside the block; the second one raises KeyboardInterrupt there.

    Python runs signal handlers between two instructions of the main thread, so not while MLX computes a step, and
    runs one for several signals. A thread therefore counts the signals as they arrive, and a handler asks it whether
    there have been two; the question goes the way of the signals, so those before it have been counted. Nothing is
    raised once the block has ended. In threads other than the main one, signals are left to the caller.

    Args:
        tell: called in another thread at the first signal.
        end: called in another thread if the block has not ended by itself `GRACE` seconds after the second signal;
            it should end the process. By default the block ends as soon as MLX returns.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    counter = _Counter(asked, tell, end)
    handlers = {name: signal.signal(name, counter.handle) for name in SIGNALS}
    before = signal.set_wakeup_fd(counter.writing, warn_on_full_buffer=False)
    try:
        try:
            yield
        finally:
            counter.over.set()
    finally:
        counter.over.set()  # again, if a signal came just before
        signal.set_wakeup_fd(before)
        for name, handler in handlers.items():
            signal.signal(name, handler)
        counter.close()


class _Counter:
    """Counts signals in a thread of its own; arguments as for `interruptible`.

    Attributes:
        writing: the end of the pipe into which Python writes the number of every signal.
        over: set when the block has ended.
    """

    def __init__(
        self, asked: threading.Event, tell: Callable[[], None], end: Callable[[], None] | None
    ) -> None:
        self._asked, self._tell, self._end = asked, tell, end
        self._reading, self.writing = os.pipe()
        self._answers, self._answering = os.pipe()
        for pipe_end in (self.writing, self._answering):
            os.set_blocking(pipe_end, False)
        self._twice, self.over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._count, name="mtp-mlx-signals", daemon=True)
        self._thread.start()

    def handle(self, *_: object) -> None:
        """The signals' handler, in the main thread. It takes no lock, since a signal may interrupt it as well."""
        _write(self.writing, QUESTION)
        if select.select([self._answers], [], [], ANSWER_SECONDS)[0]:
            os.read(self._answers, 1)
        if self._twice.is_set() and not self.over.is_set():
            raise KeyboardInterrupt

    def _count(self) -> None:
        arrived = 0
        while (received := os.read(self._reading, 1)) not in (b"", END):
            if received == QUESTION:
                _write(self._answering, ANSWER)
            elif received[0] in SIGNALS:
                arrived += 1
                if arrived == 1:
                    self._asked.set()
                    threading.Thread(target=self._say, name="mtp-mlx-says", daemon=True).start()
                elif arrived == 2:
                    self._twice.set()
                    _write(self._answering, ANSWER)
                    if self._end is not None and not self.over.wait(GRACE):
                        self._end()

    def _say(self) -> None:
        """Tells, in a thread of its own: it may have to wait for a lock that the main thread holds."""
        with suppress(OSError):  # perhaps nobody reads it
            self._tell()

    def close(self) -> None:
        """Ends the thread."""
        _write(self.writing, END)
        self._thread.join()
        for pipe_end in (self._reading, self.writing, self._answers, self._answering):
            os.close(pipe_end)


def _write(pipe_end: int, what: bytes) -> None:
    with suppress(BlockingIOError):  # full: then there is enough to read
        os.write(pipe_end, what)
