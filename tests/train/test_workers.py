"""Proves that worker threads are kept between steps, give results in order, and leave no thread behind."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import closing

import mlx.core as mx
import pytest

from mtp_mlx.train.workers import Workers


def test_results_come_in_the_order_of_the_jobs() -> None:
    with closing(Workers(3)) as workers:
        assert workers.map(lambda job: (job * job, threading.current_thread().name), []) == []
        squares = workers.map(lambda job: job * job, list(range(10)))
    assert squares == [job * job for job in range(10)]


def test_an_error_leaves_the_workers_usable() -> None:
    def fragile(job: int) -> float:
        return 1 / job

    with closing(Workers(2)) as workers:
        with pytest.raises(ZeroDivisionError):
            workers.map(fragile, [1, 0, 2])
        assert workers.map(fragile, [1, 2, 4]) == [1, 0.5, 0.25]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_many_steps_use_no_more_threads_than_one() -> None:
    """MLX gives an operating-system thread to every stream and never ends it."""

    def work(size: int) -> float:
        return mx.sum(mx.ones((size, size)) @ mx.ones((size, size))).item()

    with closing(Workers(2)) as workers:
        workers.map(work, [4, 5])
        before = len(os.listdir("/proc/self/task"))
        for _ in range(20):
            assert workers.map(work, [4, 5]) == [64.0, 125.0]
        assert len(os.listdir("/proc/self/task")) == before


def test_close_ends_threads_and_map_starts_them_again() -> None:
    workers = Workers(2)
    names = set(workers.map(lambda _: threading.current_thread(), [0, 1]))
    assert len(names) == 2
    workers.close()
    assert not any(thread.is_alive() for thread in names)
    assert workers.map(lambda job: job + 1, [1]) == [2]
    workers.close()
    workers.close()
