"""Hidden states of the frozen trunk over training text: computed in every step, or cached on disk.

The trunk is most of the work of training heads, and its states never change. A cache file holds the states of one
example, in 16 bits, and the normaliser of the main head's logits (`normaliser_of`). Its name depends on what they
depend on: the weights of the base model, the layers that are read, and the example's tokens.

Legend: S sequences, T padded length, D hidden size, n tapped layers.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mtp_mlx.drafters.heads.layout import padded
from mtp_mlx.drafters.heads.teacher import normaliser_of
from mtp_mlx.errors import MTPError
from mtp_mlx.files import write_file
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import gigabytes

NAME, NORMALISER = "hidden", "normaliser"
LARGEST_HALF = 6e4  # float16 holds less than 65520
SAMPLE = 4096  # values of every weight that are hashed


class TrunkStates(Protocol):
    """A source of hidden states."""

    def __call__(self, examples: Sequence[Example]) -> mx.array:
        """What the heads read and what teaches them (`AttachedModel.states_to_train_on`), [S, T, m * D].

        m is 1 for heads that read the last state alone. Rows of the padding on the right have no meaning.
        """
        ...

    def with_normaliser(self, examples: Sequence[Example]) -> tuple[mx.array, mx.array | None]:
        """The same, and [S, T] float32 as `normaliser_of` gives it, or None if it would have to be computed first."""
        ...


def last_state(attached: AttachedModel, states: mx.array) -> mx.array:
    """The trunk's last state, after its final norm, of `TrunkStates`: [..., m * D] -> [..., D]."""
    return states[..., -attached.hidden_size :]


def read_states(attached: AttachedModel, states: mx.array) -> mx.array:
    """What the heads read (`AttachedModel.head_input`) of `TrunkStates`: [..., m * D] -> [..., (n + 1) * D]."""
    size = attached.head_input_size
    return states if states.shape[-1] == size else states[..., :size]


class _TrunkPass:
    """Passes of the trunk from any thread: its taps hold the states of one pass at a time."""

    def __init__(self, attached: AttachedModel) -> None:
        self._attached, self._lock = attached, threading.Lock()

    def __call__(self, tokens: mx.array) -> mx.array:
        """`AttachedModel.states_to_train_on` of tokens [S, T]; lazy."""
        with self._lock:
            return self._attached.states_to_train_on(tokens)


class ComputedStates:
    """States by a pass of the trunk over each batch; lazy, in the model's dtype."""

    def __init__(self, attached: AttachedModel) -> None:
        self._trunk = _TrunkPass(attached)

    def __call__(self, examples: Sequence[Example]) -> mx.array:
        """See `TrunkStates`."""
        return self._trunk(mx.array(padded(examples)))

    def with_normaliser(self, examples: Sequence[Example]) -> tuple[mx.array, mx.array | None]:
        """See `TrunkStates`: only the rows that teach are worth it."""
        return self(examples), None


class CachedStates:
    """States from files below `folder`, written when an example is first seen; several threads may use it.

    States are always rounded as in a file, so that a run does not depend on which files exist. An example's states
    do not depend on its batch.

    Raises:
        MTPError: when called, if a file is damaged or cannot be written.
    """

    def __init__(self, attached: AttachedModel, folder: Path) -> None:
        self._attached, self._trunk = attached, _TrunkPass(attached)
        self._folder = folder / "-".join([weights_key(attached.model), *_states_read(attached)])
        self._size = attached.trained_on_size

    def path(self, example: Example) -> Path:
        """Path of an example's file."""
        key = hashlib.sha256(np.array(example.tokens, dtype=np.int32).tobytes()).hexdigest()[:24]
        return self._folder / f"{key}.safetensors"

    def __call__(self, examples: Sequence[Example]) -> mx.array:
        """See `TrunkStates`."""
        return _stacked([self._stored(example)[NAME] for example in examples])

    def with_normaliser(self, examples: Sequence[Example]) -> tuple[mx.array, mx.array | None]:
        """See `TrunkStates`; every file is read once."""
        found = [self._stored(example) for example in examples]
        return _stacked([one[NAME] for one in found]), _stacked([one[NORMALISER] for one in found])

    def _stored(self, example: Example) -> dict[str, mx.array]:
        """States [T, m * D] of one example and their normaliser [T], evaluated; written if they are missing."""
        path = self.path(example)
        found = self._read(path, example) if path.exists() else {}
        if NORMALISER in found:
            return found
        if NAME not in found:
            found[NAME] = in_half(self._trunk(mx.array(example.tokens, dtype=mx.int32)[None])[0])
        mx.eval(found)
        found[NORMALISER] = normaliser_of(self._attached, last_state(self._attached, found[NAME]))
        write_file(path, lambda temporary: mx.save_safetensors(str(temporary), found))
        return found

    def _read(self, path: Path, example: Example) -> dict[str, mx.array]:
        """The tensors of a file; earlier versions wrote no normaliser."""
        try:
            found = dict(cast("dict[str, mx.array]", mx.load(str(path))))
            states = found[NAME]
            mx.eval(found)
        except (RuntimeError, ValueError, KeyError) as error:
            raise MTPError(
                f"the cached hidden states {path} are damaged ({error}): delete the file"
            ) from error
        if states.shape != (len(example), self._size):
            raise MTPError(
                f"the cached hidden states {path} are damaged (shape {states.shape}): delete the file"
            )
        return found

    def report(self, examples: Sequence[Example]) -> str:
        """A line for the user: where the states are, how much space they take, and how many there are.

        Raises:
            MTPError: the disk has too little space.
        """
        missing = [example for example in examples if not self.path(example).exists()]
        of_token = 2 * self._size + 4
        most = of_token * sum(len(example) for example in examples)
        needed = of_token * sum(len(example) for example in missing)
        free = shutil.disk_usage(_existing(self._folder)).free
        if needed > free:
            raise MTPError(
                f"`hidden_cache` {self._folder.parent} needs {gigabytes(needed)} more, and its disk has "
                f"{gigabytes(free)} left: use another folder, or leave `hidden_cache` out"
            )
        return (
            f"hidden states are cached in {self._folder.parent}, at most {gigabytes(most)}: "
            f"{len(examples) - len(missing)} of {len(examples)} rows are there already"
        )


def _states_read(attached: AttachedModel) -> list[str]:
    """The states that the heads read besides the last one, for the name of a folder."""
    heads = attached.speculator
    if heads is None:
        return []
    first = [] if heads.first_hidden == "post-norm" else [heads.first_hidden]
    return [*map(str, heads.tapped_layers), *first]


def _stacked(rows: Sequence[mx.array]) -> mx.array:
    """[S, T, ...] of arrays [T_s, ...], with zeros on the right of the shorter ones."""
    length = max(len(own) for own in rows)
    return mx.stack([mx.pad(own, [(0, length - len(own)), *[(0, 0)] * (own.ndim - 1)]) for own in rows])


def in_half(states: mx.array) -> mx.array:
    """States in 16 bits: float32 becomes float16, or bfloat16 if values are too large for float16."""
    if states.dtype != mx.float32:
        return states
    large = mx.any(mx.abs(states) > LARGEST_HALF).item()
    return states.astype(mx.bfloat16 if large else mx.float16)


def weights_key(model: nn.Module) -> str:
    """24 hex digits that depend on the model's config and on name, dtype, shape and sampled values of all weights.

    Unlike a base model's fingerprint, it also depends on the precision of the weights, and on config that no weight
    shows, such as the scaling of rotary embeddings.
    """
    digest = hashlib.sha256(repr(getattr(model, "args", None)).encode())
    for name, value in sorted(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))):
        flat = value.reshape(-1)
        sample = flat[:: max(1, flat.size // SAMPLE)]
        if mx.issubdtype(sample.dtype, mx.floating):
            sample = sample.astype(mx.float32)
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(np.array(sample).tobytes())
    return digest.hexdigest()[:24]


def _existing(path: Path) -> Path:
    """The nearest existing folder at or above `path`."""
    path = Path(os.path.abspath(path))
    while not path.exists():
        path = path.parent
    return path
