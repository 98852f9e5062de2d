"""Several processes over the loopback interface, started by `mlx.launch` with its ring backend.

    launched = Launched(2, [*CLI, "train", ...], tmp_path)       CLI: the command line of this checkout
    result = launched.finish()                                   ends it after `limit` seconds

Every process writes its id to a file of `tmp_path`, so that a test can signal one of them (`launched.pid(rank)`).
As a script: `python -m tests.launched PIDS cli ARGUMENT...` or `... PIDS MODULE ARGUMENT...`.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import randrange

ROOT = Path(__file__).parents[1]
LAUNCHER = "from mlx._distributed_utils.launch import main; main()"


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    while True:
        first = randrange(20000, 60000)
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


class Launched:
    """`mlx.launch -n SIZE --backend ring -- python -m tests.launched PIDS ARGUMENTS`, started."""

    def __init__(self, size: int, arguments: Sequence[str], folder: Path, **environment: str) -> None:
        self._pids = folder / "pids"
        self._pids.mkdir(exist_ok=True)
        for old in self._pids.iterdir():
            old.unlink()
        words = [sys.executable, "-c", LAUNCHER, "-n", str(size), "--backend", "ring"]
        words += ["--starting-port", str(free_ports(size)), "--", sys.executable, "-m", "tests.launched"]
        self._process = subprocess.Popen(
            [*words, str(self._pids), *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdin=subprocess.PIPE,  # mlx.launch reads it; at its end it would spin
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pid(self, rank: int) -> int:
        """The process id of a rank, waited for."""
        for _ in range(600):
            path = self._pids / str(rank)
            if path.exists() and path.read_text():
                return int(path.read_text())
            time.sleep(0.1)
        raise TimeoutError(f"process {rank} never started")

    def code(self, rank: int) -> int | None:
        """How a rank ended; None if it was killed before it could say so, as mlx.launch does behind a failure."""
        path = self._pids / f"{rank}.code"
        text = path.read_text() if path.exists() else ""
        return int(text) if text else None

    def finish(self, limit: float = 240) -> tuple[str, str]:
        """(stdout, stderr) of all processes, once they have ended.

        Raises:
            subprocess.TimeoutExpired: some process still runs after `limit` seconds; all are then killed.
        """
        try:
            return self._process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            for path in self._pids.iterdir():
                if not path.suffix:
                    try:
                        os.kill(int(path.read_text()), 9)
                    except ProcessLookupError:
                        pass
            self._process.kill()
            raise


def _run(what: str) -> None:
    if what == "cli":
        from mtp_mlx.cli import main

        main()
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    pids, what = Path(sys.argv[1]), sys.argv[2]
    rank = os.environ["MLX_RANK"]
    (pids / rank).write_text(str(os.getpid()))
    sys.argv = [what, *sys.argv[3:]]
    code = 1
    try:
        _run(what)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
        raise
    finally:
        (pids / f"{rank}.code").write_text(str(code))
