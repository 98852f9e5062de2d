"""What each process of `tests/test_distributed.py` does: collectives, printed as JSON, or waiting for a lost one."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import mlx.core as mx
import numpy as np

from mtp_mlx.distributed import join
from mtp_mlx.errors import MTPError


def exchange() -> dict[str, object]:
    """One of every call; all results as plain lists."""
    peers = join()
    out: dict[str, object] = {"rank": peers.rank, "size": peers.size}
    out["gathered"] = peers.gather(
        {"text": "ü" * (1 + 40 * peers.rank), "nan": float("nan"), "n": peers.rank}
    )
    mine = peers.rank + 1
    shared = peers.share(
        {
            "bf16": (mine * mx.array([0.1, -3.0])).astype(mx.bfloat16),
            "ids": mx.array([7 * mine, 2**31 + mine], dtype=mx.uint32),
            "steps": mx.array(mine * 2**40, dtype=mx.uint64),
        }
    )
    out["shared"] = {name: np.array(value.astype(mx.float32) if name == "bf16" else value).tolist()
                     for name, value in shared.items()}  # fmt: skip
    gradients = {"a.0.a": [mx.array([[1.0, 2.0]]) * mine], "b": mx.array(5.0) + mine}
    mean = peers.weighted_mean(gradients, share=mine / sum(range(1, peers.size + 1)))
    out["mean"] = [mean["a.0.a"][0].tolist(), mean["b"].tolist()]
    peers.must_agree({"model": "same"}, "x")
    for call in (
        lambda: peers.must_agree({"model": f"m{peers.rank}"}, "start all with the same model"),
        lambda: peers.share({"w": mx.zeros((2 + peers.rank,))}),
    ):
        try:
            call()
            out.setdefault("refusals", []).append("none")  # type: ignore[union-attr, attr-defined]
        except MTPError as error:
            out.setdefault("refusals", []).append(str(error))  # type: ignore[union-attr, attr-defined]
    return out


def main(mode: str) -> None:
    """`exchange`; or rank 1 is killed or stopped behind the first collective, and the others go on."""
    if mode == "exchange":
        sys.stdout.write(json.dumps(exchange()) + "\n")
        return
    peers = join()
    peers.gather(0)
    if peers.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL if mode == "killed" else signal.SIGSTOP)
    started = time.monotonic()
    try:
        for _ in range(100):
            peers.gather(0)
    except MTPError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # mlx.launch's, which may come while this is written
        sys.stderr.write(f"MTPError after {time.monotonic() - started:.0f} s: {error}\n")
        sys.exit(2)


main(sys.argv[1])
