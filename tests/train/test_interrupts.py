"""Proves that the second signal ends a run even if the message after the first one cannot be written."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os, signal, threading, time
from mtp_mlx.train.interrupts import interruptible

asked, told = threading.Event(), threading.Event()

def tell():
    told.set()
    raise BrokenPipeError

try:
    with interruptible(asked, tell):
        os.kill(os.getpid(), signal.SIGINT)
        assert told.wait(10) and asked.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    print("not ended")
except KeyboardInterrupt:
    print("ended")
"""


def test_a_message_that_nobody_reads_does_not_end_the_count() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ended\n", done.stderr
