"""One training step over the processes of a run: each has its own micro-batches, all apply the same update.

Legend: N processes, M micro-batches of each. Process r computes micro-batch step * N * M + r * M and M - 1 more.
So a step has those of one process with N * M micro-batches, and the mean over all, weighted by supervised rows, is
the same too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.optimizers as optim

from mtp_mlx.distributed import Peers
from mtp_mlx.train import checkpoint as checkpoints
from mtp_mlx.train.loss import LossParts


@dataclass(frozen=True)
class StepMean:
    """A step over all processes.

    Attributes:
        loss, parts: means weighted by rows; of a part, over the processes that have it.
        gradients: the same mean.
        rows: supervised rows of all.
        stop: some process was asked to stop. All of them must: one that went on would wait for the others for ever.
    """

    loss: float
    parts: dict[str, float]
    gradients: dict
    rows: int
    stop: bool


def number(scalar: mx.array) -> float:
    """A scalar array as a Python number."""
    return float(cast("float", scalar.item()))


def step_mean(peers: Peers, loss: LossParts, gradients: dict, rows: int, stop: bool) -> StepMean:
    """The mean over all processes of what each computed.

    Raises:
        MTPError: another process was lost.
    """
    mx.eval(loss.total, loss.parts, gradients)  # outside the time that others are waited for
    own = {name: number(part) for name, part in loss.parts.items()}
    every = peers.gather({"loss": number(loss.total), "parts": own, "rows": rows, "stop": stop})
    total = max(sum(one["rows"] for one in every), 1)
    parts = {}
    for name in dict.fromkeys(name for one in every for name in one["parts"]):
        have = [one for one in every if name in one["parts"]]
        weight = max(sum(one["rows"] for one in have), 1)
        parts[name] = sum(one["rows"] / weight * one["parts"][name] for one in have)
    return StepMean(
        loss=sum(one["rows"] / total * one["loss"] for one in every),
        parts=parts,
        gradients=peers.weighted_mean(gradients, rows / total),
        rows=sum(one["rows"] for one in every),
        stop=any(one["stop"] for one in every),
    )


def start_as_one(
    peers: Peers,
    given: dict[str, object],
    step: int,
    trained: checkpoints.Trained,
    optimizer: optim.Optimizer,
) -> int:
    """Gives every process the weights and the optimizer state of process 0; returns its step.

    Args:
        given: what all must have been started with, as JSON values.

    Raises:
        MTPError: they were not, or another process was lost.
    """
    if peers.alone:
        return step
    peers.must_agree(given, "start all of them with the same command, model and data")
    first = int(peers.gather(step)[0])
    tensors = peers.share(checkpoints.state_tensors(trained, optimizer))
    checkpoints.restore(checkpoints.Checkpoint(first, tensors, {}, ""), trained, optimizer)
    return first
