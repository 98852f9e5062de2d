"""The fastest choice found by `mtp-mlx tune`, stored in the user's cache, where layout "auto" reads it.

The key is that of measured step costs (`calibrate.cost_key`: device, mlx version, threads, model, dtype, drafter,
kernels) and a digest of the drafter's weights, on which acceptance depends.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mtp_mlx.decode.policy import LayoutName
from mtp_mlx.errors import MTPError
from mtp_mlx.files import cache_dir, clear_errors, keep_if_possible, kept_file, warn_once, write_text
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.planning.calibrate import cost_key

_SAMPLE = 64  # values of each tensor that go into the digest
_LAYOUTS = ("auto", "linear", "quadratic", "tree", "plain")

log = logging.getLogger("mtp_mlx")


@dataclass(frozen=True)
class TunedChoice:
    """The fastest choice that was measured.

    Attributes:
        name: name of the measured lane.
        layout, drafts, drafter, rows: as the arguments of the same names; layout "auto" is the planner.
        tokens_per_second, plain_tokens_per_second: measured speed of this choice and of plain decoding.
    """

    name: str
    layout: LayoutName
    drafts: int | None
    drafter: str | None
    tokens_per_second: float
    plain_tokens_per_second: float
    rows: int | None = None

    @property
    def description(self) -> str:
        """The sentence that statistics show."""
        if self.layout == "plain":
            return "tuned: nothing beat plain decoding"
        return f"tuned: {self.name}, {self.tokens_per_second / self.plain_tokens_per_second:.2f}x plain"


def tuned_key(model: AttachedModel) -> dict[str, str]:
    """The key of a stored choice: everything that it depends on."""
    return {**cost_key(model), "weights": weights_digest(model)}


def weights_digest(model: AttachedModel) -> str:
    """16 hex digits that identify the drafter's weights, which differ between trainings; "none" without weights."""
    weights = {} if model.speculator is None else model.speculator.parameters()
    tensors = sorted(cast("list[tuple[str, mx.array]]", tree_flatten(weights)))
    if not tensors:
        return "none"
    shapes = json.dumps([(name, tensor.shape) for name, tensor in tensors])
    samples = [tensor.reshape(-1)[:_SAMPLE].astype(mx.float32) for _, tensor in tensors]
    values = np.array(mx.concatenate(samples))  # one evaluation, since every generation needs it
    return hashlib.sha256(shapes.encode() + values.tobytes()).hexdigest()[:16]


def remember(model: AttachedModel, choice: TunedChoice, measured: dict[str, Any]) -> Path | None:
    """Stores the choice for this model, drafter and machine; returns the file, or None if it cannot be written.

    Args:
        model: the model with its drafter.
        choice: the choice to store.
        measured: all measurements, stored for people to read.
    """
    key = tuned_key(model)
    text = json.dumps({"key": key, "choice": asdict(choice), "measured": measured}, indent=2) + "\n"
    kept = keep_if_possible(lambda: write_text(cache_dir().joinpath(*_names(key)), text), "tuned layouts")
    return kept_file(*_names(key)) if kept else None


def recall(model: AttachedModel) -> TunedChoice | None:
    """The choice for this model, drafter and machine; None if there is none or it is damaged (which is logged)."""
    key = tuned_key(model)
    path = kept_file(*_names(key))
    if path is None:
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        choice = TunedChoice(**_renamed(stored["choice"]))
        if stored["key"] != key:
            return None
        if choice.layout not in _LAYOUTS or not choice.plain_tokens_per_second > 0:
            raise ValueError("not a layout and its speed")
        return choice
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = error.strerror or error
        warn_once(str(path), f"{path} cannot be read ({reason}): layout auto plans as if untuned")
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning(
            "%s is damaged (%s): layout auto plans as if untuned; run mtp-mlx tune again", path, error
        )
        return None


def _renamed(choice: dict[str, Any]) -> dict[str, Any]:
    """A stored choice with today's names; older files call `drafts` slots."""
    return {("drafts" if name == "slots" else name): value for name, value in choice.items()}


def forget(model: AttachedModel) -> bool:
    """Removes the choice for this model, drafter and machine; False if there was none.

    Raises:
        MTPError: if the file cannot be removed.
    """
    path = kept_file(*_names(tuned_key(model)))
    if path is None or not path.exists():
        return False
    try:
        with clear_errors(path):
            path.unlink()
    except MTPError as error:
        raise MTPError(f"{path} could not be removed: remove it yourself") from error
    return True


def _names(key: dict[str, str]) -> tuple[str, str]:
    """Folder and name of the file in the cache."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return "tuned", f"{digest}.json"
