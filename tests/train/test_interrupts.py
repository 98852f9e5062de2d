"""Proves that the second signal ends a run, whatever becomes of the message after the first, and none comes later."""

from __future__ import annotations

import subprocess
import sys

UNREAD = """
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
    done = subprocess.run([sys.executable, "-c", UNREAD], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ended\n", done.stderr


LATE = """
import os, signal, threading, time
from mtp_mlx.train.interrupts import interruptible

asked, told, send = threading.Event(), threading.Event(), signal.pthread_kill

def slowly(*call):  # another thread's signal may take its time
    time.sleep(0.5)
    send(*call)

signal.pthread_kill = slowly
pressed = lambda: os.kill(os.getpid(), signal.SIGINT)
try:
    with interruptible(asked, told.set):
        pressed()
        assert told.wait(10)
        try:
            while True:
                pressed()
                time.sleep(0.05)
        except KeyboardInterrupt:
            print("ended")
    time.sleep(1.5)
    print("quiet")
except KeyboardInterrupt:
    print("interrupted after the block")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert signal.set_wakeup_fd(-1) == -1 and threading.active_count() == 1
"""


def test_no_signal_arrives_after_the_block() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ended\nquiet\n", done.stderr
    assert done.returncode == 0, done.stderr


BUSY = """
import os, signal, threading, time
from mtp_mlx.train.interrupts import interruptible

asked, lock = threading.Event(), threading.RLock()

def tell():
    with lock:  # as a console has one, which the main thread may hold when the signal arrives
        pass

try:
    with interruptible(asked, tell), lock:
        started = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    print("not ended")
except KeyboardInterrupt:
    print("ended", asked.is_set(), time.monotonic() - started < 3)
"""


def test_a_message_that_waits_for_the_main_thread_holds_nothing_up() -> None:
    done = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ended True True\n", done.stderr


MANY = """
import os, signal, threading
from mtp_mlx.train.interrupts import interruptible

for _ in range(200):
    asked = threading.Event()
    try:
        with interruptible(asked, lambda: None):
            for name in (signal.SIGINT, signal.SIGTERM) * 3:
                signal.raise_signal(name)
            os._exit(7)
    except KeyboardInterrupt:
        assert asked.is_set()
print("done")
"""


def test_signals_that_interrupt_each_other_s_handlers() -> None:
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
