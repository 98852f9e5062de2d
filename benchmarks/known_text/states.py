"""What a model computes of a known text, in one run over it, kept in files.

Legend: T tokens of a text, A of them the answer's, D hidden size, n tapped layers, k slots.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mtp_mlx.decode.drafter import Drafter, source_of
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import sampling_for
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.step import block_of
from mtp_mlx.drafters.heads.trunk_states import weights_key
from mtp_mlx.errors import MTPError
from mtp_mlx.files import write_file
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example

BLOCK = 8  # tokens of the answer in a pass


@dataclass(frozen=True)
class States:
    """What a model computes of a text.

    Attributes:
        read: [T - 1, (n + 1) * D] what its drafter reads of every token but the last (`AttachedModel.head_input`).
        slots: [A, lead + k, D] hidden states of the slots behind the prompt's last token and behind every token of
            the answer but the last; k is 0 if the drafter has no slots.
    """

    read: mx.array
    slots: mx.array


class _Reading(Drafter):
    """Keeps what the drafter would be told of the prompt, and gives its slots their uniforms."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.read: list[mx.array] = []

    def observe(self, head_input: mx.array, tokens: list[int]) -> None:
        """See `Drafter`."""
        self.read.append(head_input[0])

    def uniforms(self, shape: Any, start: int) -> mx.array | None:
        """See `Drafter`."""
        return self._drafter.uniforms(shape, start)


def greedy_picker(attached: AttachedModel) -> Picker:
    """The picker of greedy decoding with this model's drafter."""
    return Picker(sampling_for(source_of(attached), SamplingConfig(), True), attached.exact)


def states_of(attached: AttachedModel, example: Example) -> States:
    """Runs a model with a drafter over a text: the prompt, then `BLOCK` tokens of the answer in a pass."""
    source = source_of(attached)
    assert source is not None
    picker, k = greedy_picker(attached), source.drafts if source.places_slots else 0
    reading = _Reading(source.open(attached, picker, source.drafts, 0))
    prompt, cache = example.tokens[: example.loss_start], attached.make_cache()
    session = Session(attached, picker, prompt, cache, CacheSettings(), lambda _: reading)
    session.prefill()
    read, slots = reading.read, list[mx.array]()
    while len(session.tokens) < len(example):
        known = example.tokens[len(session.tokens) :][:BLOCK]  # the last is pending after the pass
        layout = Layout(len(known) - 1, (k,) * len(known))
        hidden = session.forward(block_of(session, layout, known[:-1], session.cached))[0]
        read.append(attached.head_input[0, : layout.real_rows])
        slots.append(hidden[layout.real_rows :])
        mx.eval(read, slots)
        session.keep_path(list(range(layout.real_rows)))
        session.tokens += known
    behind = mx.concatenate(slots).reshape(len(example) - example.loss_start, -1, attached.hidden_size)
    return States(mx.concatenate(read), behind)


class StateStore:
    """States of texts, in files below a folder if there is one: read if they are there, else computed and written.

    Args:
        attached: a model with a drafter.
        folder: the folder, or None.
        held: the arrays of the newest text by name, which stores of one base model share: those of several drafters
            often read the same states of it.
    """

    def __init__(self, attached: AttachedModel, folder: Path | None, held: dict[str, mx.array]) -> None:
        source = source_of(attached)
        assert source is not None
        with attached.unwrapped() as model:
            base = weights_key(model)
        states = "-".join(map(str, (source.first_hidden, *source.tapped_layers)))
        self._attached, self._folder, self._held = attached, folder, held
        self._names = {"read": f"{base}-{states}"}
        if source.places_slots:
            self._names["slots"] = f"{base}-{weights_key(source)}-{source.drafts}"

    def __call__(self, example: Example) -> States:
        """The states of a text.

        Raises:
            MTPError: if a file is damaged or cannot be written.
        """
        known = np.array([example.loss_start, *example.tokens], dtype=np.int32).tobytes()
        text = hashlib.sha256(known).hexdigest()[:24]
        names = {part: f"{name}/{text}" for part, name in self._names.items()}
        found = {part: self._found(name) for part, name in names.items()}
        if any(value is None for value in found.values()):
            computed = states_of(self._attached, example)
            found = {part: getattr(computed, part) for part in names}
            for part, name in names.items():
                self._keep(name, cast(mx.array, found[part]))
        answer = len(example) - example.loss_start
        return States(**{"slots": mx.zeros((answer, 0, self._attached.hidden_size)), **cast(Any, found)})

    @property
    def of_slots(self) -> bool:
        """Whether the drafter has slots."""
        return "slots" in self._names

    def forget(self) -> None:
        """Drops what is held in memory."""
        self._held.clear()

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"

    def _found(self, name: str) -> mx.array | None:
        if name in self._held or self._folder is None or not self._path(name).exists():
            return self._held.get(name)
        try:
            loaded = cast("dict[str, mx.array]", mx.load(str(self._path(name))))["states"]
            mx.eval(loaded)
        except (RuntimeError, ValueError, KeyError) as error:
            raise MTPError(f"the states {self._path(name)} are damaged ({error}): delete the file") from error
        self._held[name] = loaded
        return loaded

    def _keep(self, name: str, states: mx.array) -> None:
        self._held[name] = states
        if self._folder is not None:
            write_file(self._path(name), lambda path: mx.save_safetensors(str(path), {"states": states}))
