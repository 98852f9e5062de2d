"""Threads that evaluate MLX graphs in parallel for the whole of a run.

An MLX stream belongs to the thread that first uses it, takes an operating-system thread that MLX never releases,
and can abort the process if it outlives its thread. So the threads are few, are kept between steps, and clear their
streams before they end.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers:
    """`count` threads, started by `map` if they are not running, ended by `close`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._inboxes: list[queue.SimpleQueue[Any]] = []
        self._done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def map(self, call: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """`call(job)` for every job, in the order of the jobs; when all are done, raises the first job's error."""
        self._start()
        for index, job in enumerate(jobs):
            self._inboxes[index % self.count].put((index, call, job))
        results: dict[int, Result] = {}
        errors: dict[int, BaseException] = {}
        for _ in jobs:
            index, result, error = self._done.get()
            if error is not None:
                errors[index] = error
            results[index] = result
        if errors:
            raise errors[min(errors)]
        return [results[index] for index in range(len(jobs))]

    def close(self) -> None:
        """Ends the threads once their jobs are done."""
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            thread.join()
        self._inboxes, self._threads = [], []
        self._done = queue.SimpleQueue()

    def _start(self) -> None:
        while len(self._threads) < self.count:
            inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
            thread = threading.Thread(target=self._work, args=(inbox, self._done), daemon=True)
            self._inboxes.append(inbox)
            self._threads.append(thread)
            thread.start()

    @staticmethod
    def _work(inbox: queue.SimpleQueue[Any], done: queue.SimpleQueue[Any]) -> None:
        try:
            while (message := inbox.get()) is not None:
                index, call, job = message
                try:
                    done.put((index, call(job), None))
                except BaseException as error:  # the caller raises it
                    done.put((index, None, error))
        finally:
            mx.synchronize()
            mx.clear_streams()
