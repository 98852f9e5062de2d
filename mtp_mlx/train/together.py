"""Training steps shared by several processes: each computes its own micro-batches, all apply the same update.

With N processes of M micro-batches each, process r computes M micro-batches from number step * N * M + r * M on.
Together they are those of one process with N * M micro-batches, and so is their mean, weighted by supervised rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.optimizers as optim

from mtp_mlx.distributed import Peers
from mtp_mlx.train import checkpoint as checkpoints
from mtp_mlx.train.average import WeightAverage
from mtp_mlx.train.loss import LossParts


@dataclass(frozen=True)
class StepMean:
    """Result of a step over all processes.

    Attributes:
        loss: mean, weighted by supervised rows.
        parts: means of the parts, over the processes that have them.
        gradients: mean, weighted by supervised rows.
        rows: supervised rows of all processes.
        stop: whether a process was asked to stop. Then all must stop: one that went on would wait for ever.
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
    """Mean over all processes of what each of them computed.

    Raises:
        MTPError: another process has died.
    """
    mx.eval(loss.total, loss.parts, gradients)  # before the collective, whose time is limited
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
    average: WeightAverage,
) -> int:
    """Copies the training state of process 0 to all processes; returns the step that they start from.

    Args:
        given: JSON values that must be the same in all processes.

    Raises:
        MTPError: they differ, or another process has died.
    """
    if peers.alone:
        return step
    peers.must_agree(given, "start all of them with the same command, model and data")
    first = int(peers.gather(step)[0])
    tensors = peers.share(checkpoints.state_tensors(trained, optimizer, average))
    checkpoints.restore(checkpoints.Checkpoint(first, tensors, {}, ""), trained, optimizer, average)
    return first
