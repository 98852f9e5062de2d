"""Training state on disk: one safetensors file, written whole or not at all, from which a run resumes exactly.

It holds the adapter in float32, the average of its weights if there is one, the optimizer's state, the step and the
settings. Data order and sampled positions
are functions of (seed, step), so nothing else is needed.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mtp_mlx.errors import MTPError
from mtp_mlx.files import write_file
from mtp_mlx.model.base_sample import BaseSample
from mtp_mlx.train.average import WeightAverage
from mtp_mlx.train.settings import TrainSettings

# Settings that may change when a run resumes, because losses do not depend on them (except for the rounding of
# cached hidden states). An adapter does not record them either.
FREE_SETTINGS = frozenset(
    {
        "out",
        "data",
        "measure_every",
        "save_every",
        "grad_checkpoint",
        "model",
        "trust_remote_code",
        "hidden_cache",
        "memory",
        "store",
    }
)


class Trained(Protocol):
    """The part of `mtp_mlx.train.method.Method` that checkpoints need."""

    def tensors(self) -> dict[str, mx.array]: ...

    def load_tensors(self, tensors: dict[str, mx.array]) -> None: ...


@dataclass
class Checkpoint:
    """A training state, after `step` steps."""

    step: int
    tensors: dict[str, mx.array]
    settings: dict[str, Any]
    data_fingerprint: str
    base_fingerprint: str = ""
    base_sample: BaseSample | None = None


def comparable(settings: TrainSettings) -> dict[str, Any]:
    """The method and its settings, as JSON values, without those that a resumed run may change."""
    values = _json({"method": settings.method, **dataclasses.asdict(settings)})
    return {name: value for name, value in values.items() if name not in FREE_SETTINGS}


def _known_then(checkpoint: Checkpoint, settings: TrainSettings) -> dict[str, Any]:
    """`comparable(settings)` without those that are newer than the checkpoint and at their defaults.

    Checkpoints older than the second training method do not name theirs; their tensors tell.
    """
    defaults = _json({field.name: field.default for field in dataclasses.fields(settings)})
    defaults["method"] = settings.method
    now = comparable(settings)
    return {
        name: value for name, value in now.items() if name in checkpoint.settings or value != defaults[name]
    }


def _json(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back: lists for tuples, text for paths."""
    return dict(json.loads(json.dumps(values, default=str)))


def save_checkpoint(
    path: Path,
    adapter: Trained,
    optimizer: optim.Optimizer,
    average: WeightAverage,
    step: int,
    settings: TrainSettings,
    data_fingerprint: str,
    base_fingerprint: str = "",
    base_sample: BaseSample | None = None,
) -> None:
    """Writes the state after `step` steps.

    Raises:
        MTPError: the file cannot be written; the previous checkpoint stays.
    """
    tensors = state_tensors(adapter, optimizer, average)
    metadata = {
        "step": str(step),
        "settings": json.dumps(comparable(settings)),
        "data": data_fingerprint,
        "base": base_fingerprint,
        "base_sample": "" if base_sample is None else json.dumps(base_sample.to_json()),
    }

    def write(temporary: Path) -> None:
        mx.save_safetensors(str(temporary), tensors, metadata=metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # its content must be on disk before it is renamed

    write_file(path, write)


def state_tensors(
    adapter: Trained, optimizer: optim.Optimizer, average: WeightAverage
) -> dict[str, mx.array]:
    """Weights, optimizer state and averaged weights by the names they have in a checkpoint."""
    parts = {"adapter": adapter.tensors(), "optimizer": flat_state(optimizer), "average": average.tensors()}
    return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def remove_leftovers(path: Path) -> None:
    """Removes temporary files that killed processes left while writing `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.stem)}.*{path.suffix}"):
        owner = leftover.name.removeprefix(f".{path.stem}.").partition(".")[0]  # a process, then its thread
        if owner.isdigit() and not _is_running(int(owner)):
            leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        MTPError: the file is damaged.
    """
    try:
        tensors, metadata = cast("tuple[dict, dict]", mx.load(str(path), return_metadata=True))
        mx.eval(tensors)
        sample = metadata.get("base_sample")
        return Checkpoint(
            step=int(metadata["step"]),
            tensors=tensors,
            settings=json.loads(metadata["settings"]),
            data_fingerprint=metadata["data"],
            base_fingerprint=metadata.get("base", ""),
            base_sample=BaseSample.from_json(json.loads(sample)) if sample else None,
        )
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise MTPError(f"the checkpoint {path} is damaged ({error}): delete it to start again") from error


def check_resumable(
    checkpoint: Checkpoint,
    path: Path,
    settings: TrainSettings,
    data_fingerprint: str,
    base_fingerprint: str = "",
    base_sample: BaseSample | None = None,
) -> None:
    """Refuses to resume a run with other settings, other data or another base model.

    Fingerprints and samples of the base are compared if both are known; its precision may change.

    Raises:
        MTPError: something differs; the message lists all differences.
    """
    now = _known_then(checkpoint, settings)
    keys = now.keys() | checkpoint.settings.keys()
    changed = [
        f"{key} was {checkpoint.settings.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(keys)
        if now.get(key) != checkpoint.settings.get(key)
    ]
    if data_fingerprint != checkpoint.data_fingerprint:
        changed.append("the training data changed")
    if "" not in (base_fingerprint, checkpoint.base_fingerprint):
        if base_fingerprint != checkpoint.base_fingerprint:
            changed.append(f"the base model was {checkpoint.base_fingerprint}, now {base_fingerprint}")
        elif base_sample is not None and checkpoint.base_sample is not None:
            if checkpoint.base_sample.against(base_sample) != "same":
                changed.append("the base model's weights changed by more than rounding, though not its norms")
    if changed:
        raise MTPError(
            f"{path} belongs to another run: {'; '.join(changed)}. Use the old settings or another `out`, or "
            "delete the checkpoint"
        )


def restore(
    checkpoint: Checkpoint, adapter: Trained, optimizer: optim.Optimizer, average: WeightAverage
) -> None:
    """Sets the weights, the state of an initialised optimizer and the average to those of a checkpoint.

    The average of a checkpoint without one, which is older than `ema`, starts at its weights.

    Raises:
        MTPError: tensors are missing or have another shape.
    """
    adapter.load_tensors(_part(checkpoint, "adapter"))
    averaged = _part(checkpoint, "average")
    if averaged:
        average.load_tensors(averaged)
    else:
        average.restart()
    for name, holder, key in _leaves(optimizer.state):
        if f"optimizer/{name}" not in checkpoint.tensors:
            raise MTPError(f"the checkpoint is damaged (no optimizer/{name}): delete it to start again")
        holder[key] = checkpoint.tensors[f"optimizer/{name}"]


def _part(checkpoint: Checkpoint, part: str) -> dict[str, mx.array]:
    """The tensors of a checkpoint whose names start with "part/", without that."""
    named = checkpoint.tensors.items()
    return {name.removeprefix(f"{part}/"): value for name, value in named if name.startswith(f"{part}/")}


def flat_state(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's state by dotted name."""
    return dict(tree_flatten(optimizer.state))


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, container, key) of every leaf, named as `tree_flatten` names it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found: list[tuple[str, Any, Any]] = []
    for key, value in list(items):
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict | list):
            found += _leaves(value, name)
        else:
            found.append((name, tree, key))
    return found
