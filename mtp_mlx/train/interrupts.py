"""Ctrl-C in a training run: the first press ends it after the step, the second one at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 0.5  # seconds that the main thread has to end by itself


@contextmanager
def interruptible(
    asked: threading.Event, tell: Callable[[], None], end: Callable[[], None] | None = None
) -> Iterator[None]:
    """Sets `asked` at the first SIGINT or SIGTERM inside the block; the second one raises KeyboardInterrupt there.

    Python runs signal handlers between two instructions of the main thread, so not while MLX computes a step. A
    thread therefore counts the signals as they arrive. In threads other than the main one, signals are left to the
    caller.

    Args:
        tell: called in another thread at the first signal.
        end: called in another thread if the block has not ended by itself `GRACE` seconds after the second signal;
            it should end the process. By default the block ends as soon as MLX returns.
    """
    main = threading.main_thread().ident
    if threading.get_ident() != main:
        yield
        return
    twice, over = threading.Event(), threading.Event()

    def raise_if_twice(*_: object) -> None:
        asked.set()
        if twice.is_set():
            raise KeyboardInterrupt

    def count() -> None:
        arrived = 0
        while not over.is_set() and (received := os.read(reading, 1)):
            if received[0] not in SIGNALS:
                continue
            arrived += 1
            if arrived == 1:
                asked.set()
                with suppress(OSError):  # perhaps nobody reads it; the second signal still counts
                    tell()
            elif arrived == 2:
                twice.set()
                # The handler may have run before `twice` was set; this wakes a sleeping main thread too.
                signal.pthread_kill(main, signal.SIGINT)
                if end is not None and not over.wait(GRACE):
                    end()

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=count, name="mtp-mlx-signals", daemon=True)
    handlers = {name: signal.signal(name, raise_if_twice) for name in SIGNALS}
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        for name, handler in handlers.items():
            signal.signal(name, handler)
        with suppress(OSError):
            os.write(writing, b"\0")
        watcher.join()
        os.close(reading)
        os.close(writing)
