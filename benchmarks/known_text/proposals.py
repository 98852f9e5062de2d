"""What a drafter proposes behind every token of a known answer, by its own code, from the states of the text.

Legend: D hidden size, P rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np

from known_text.states import States, greedy_picker
from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified, source_of
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.tree import ROOT
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import block_shape
from mtp_mlx.planning.grow import MOST_CANDIDATES
from mtp_mlx.train.data import Example


class _SharingPicker(Picker):
    """Picks candidates of slots, once for every slot and token before it: several widths ask for the same ones.

    A slot's candidates depend on its state and on that token, and they are the first ones of `MOST_CANDIDATES`.

    Attributes:
        place: of the step.
        newest: [P] the tokens that the drafter has embedded, one for each row that it asks for next; None for none.
    """

    place = 0
    newest: mx.array | None = None

    def __init__(self, config: SamplingConfig, exact: bool) -> None:
        super().__init__(config, exact)
        self._known: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}

    def know(self, keys: Sequence[tuple[int, int, int]], found: tuple[mx.array, mx.array]) -> None:
        """Remembers candidates.

        Args:
            keys: [P] place of the step, position, and the token before.
            found: as of `candidates`, with a row for each key.
        """
        self._known.update(zip(keys, zip(*map(np.array, found), strict=True), strict=True))

    def candidates(
        self,
        logits: mx.array,
        positions: mx.array,
        history: mx.array | None,
        token_ids: mx.array | None,
        count: int,
    ) -> tuple[mx.array, mx.array]:
        """See `Picker`. Logits that are not needed are never evaluated."""
        newest, self.newest = self.newest, None
        if newest is None or count > MOST_CANDIDATES:
            return super().candidates(logits, positions, history, token_ids, count)
        pairs = zip(cast(Any, positions.tolist()), cast(Any, newest.tolist()), strict=True)
        keys = [(self.place, position, token) for position, token in pairs]
        if missing := [row for row, key in enumerate(keys) if key not in self._known]:
            rows = mx.array(missing)
            found = super().candidates(logits[rows], positions[rows], None, token_ids, MOST_CANDIDATES)
            self.know([keys[row] for row in missing], found)
        ids, chances = zip(*(self._known[key] for key in keys), strict=True)
        return mx.array(np.stack(ids)[:, :count]), mx.array(np.stack(chances)[:, :count])

    def pick_with_confidence(
        self,
        logits: mx.array,
        positions: mx.array,
        history: mx.array | None = None,
        token_ids: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """See `Picker`."""
        if self.newest is None:
            return super().pick_with_confidence(logits, positions, history, token_ids)
        ids, chances = self.candidates(logits, positions, history, token_ids, 1)
        return ids[:, 0], chances[:, 0]


class _Embedding:
    """A model that tells a picker which tokens the drafter embeds."""

    def __init__(self, attached: AttachedModel, picker: _SharingPicker) -> None:
        self._attached, self._picker = attached, picker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attached, name)

    def embed(self, ids: mx.array) -> mx.array:
        """See `AttachedModel`."""
        self._picker.newest = ids
        return self._attached.embed(ids)


class SlotProposals:
    """What a drafter with slots proposes behind every token of an answer, each made once, when it is asked for.

    Args:
        attached: the model.
        example: the text.
        states: of it.
    """

    def __init__(self, attached: AttachedModel, example: Example, states: States) -> None:
        source = source_of(attached)
        assert source is not None
        self._attached, self._example, self._states, self._source = attached, example, states, source
        self._verified = partial(_step_of, attached, example, states)
        self._picker = _SharingPicker(greedy_picker(attached).config, attached.exact)
        seen = cast(AttachedModel, _Embedding(attached, self._picker))
        self._drafter = source.open(seen, self._picker, source.drafts, 0)  # it remembers nothing
        self._known: dict[tuple[int, int], LazyDrafts] = {}

    def behind(self, place: int, width: int) -> LazyDrafts:
        """The drafts after the text's first `place` + 2 tokens are known.

        Args:
            place: of the newest row that is accepted, from the prompt's last token to the last but one.
            width: candidates of a position.
        """
        if not self._known and "sampler" in self._source:
            self._look_ahead()
        self._picker.place = place
        if (place, width) not in self._known:
            self._known[place, width] = _evaluated(self._drafter.propose(self._verified(place, width)))
        return self._known[place, width]

    def _look_ahead(self) -> None:
        """Tells the picker at once, of all places, what nearly all their drafts will be picked from.

        The weights of the sampler and the head are then read once a slot, and not once a place and slot. What is
        missing still, the drafter computes; so this changes no draft.
        """
        tokens, first = self._example.tokens, self._example.loss_start - 1
        places, attached = np.arange(first, len(tokens) - 1), self._attached
        newest, paths = mx.array(tokens[first + 1 :])[:, None], mx.ones((len(places), 1))  # [A, P]
        head, ids = attached.draft_vocabulary.head, attached.draft_ids
        for slot in range(attached.lead, self._states.slots.shape[1]):
            count = newest.shape[1]
            latent = mx.broadcast_to(
                self._states.slots[:, slot : slot + 1], (*newest.shape, attached.hidden_size)
            )
            logits = head(cast(Any, self._source).sampler(attached.embed(newest), latent))  # [A, P, C]
            positions = np.repeat(places + slot + 2 - attached.lead, count)
            found = self._picker.candidates(
                logits.reshape(-1, logits.shape[-1]), mx.array(positions), None, ids, MOST_CANDIDATES
            )
            keys = zip(
                np.repeat(places, count).tolist(), positions.tolist(), np.array(newest).reshape(-1).tolist()
            )
            self._picker.know(list(keys), found)
            along = (paths[:, :, None] * found[1].reshape(len(places), count, -1)).reshape(len(places), -1)
            best = mx.argsort(-along, axis=-1)[:, :MOST_CANDIDATES]
            newest = mx.take_along_axis(found[0].reshape(len(places), -1), best, axis=-1)
            paths = mx.take_along_axis(along, best, axis=-1)


class ChainProposals:
    """The same of a drafter that drafts after the pass and keeps what it has read, such as heads.

    It walks through the text once, with as many candidates as a step may ask for. Fewer are the first of these where
    nothing follows but a position's first choice; elsewhere they are asked for themselves.
    """

    def __init__(self, attached: AttachedModel, example: Example, states: States) -> None:
        source = source_of(attached)
        assert source is not None
        self._verified = partial(_step_of, attached, example, states)
        picker, self._first = greedy_picker(attached), example.loss_start - 1
        self._shared = {id(one): one for one in (attached, picker, source, *source.modules())}
        self._drafters: list[Drafter] = []  # that have read the rows before each place
        self._widest: list[LazyDrafts] = []
        self._known: dict[tuple[int, int], LazyDrafts] = {}
        self._walk(source.open(attached, picker, source.drafts, 0), example, states)

    def _walk(self, drafter: Drafter, example: Example, states: States) -> None:
        if self._first:
            read = example.tokens[: self._first + 1]
            drafter.observe(states.read[None, : self._first], read)
            drafter.catch_up(read)
        for place in range(self._first, len(example) - 1):
            self._drafters.append(self._copy(drafter))
            made = drafter.propose(self._verified(place, MOST_CANDIDATES))
            self._widest.append(_evaluated(made))
            drafter.commit(0)

    def behind(self, place: int, width: int) -> LazyDrafts:
        """See `SlotProposals`."""
        if (place, width) not in self._known:
            index = place - self._first
            made = _narrowed(self._widest[index], width)
            if made is None:
                made = self._copy(self._drafters[index]).propose(self._verified(place, width))
            self._known[place, width] = _evaluated(made)
        return self._known[place, width]

    def _copy(self, drafter: Drafter) -> Drafter:
        """The same drafter with caches of its own."""
        return copy.deepcopy(drafter, dict(self._shared))


def _narrowed(made: LazyDrafts, width: int) -> LazyDrafts | None:
    """The first `width` candidates of each position; None if others than the first choice are continued."""
    if made.parents is None:
        return made
    each = int(mx.sum(made.parents == ROOT).item())
    starts = range(0, len(made.ids), each)
    joined = LazyDrafts.joined(
        *([part[i : i + each] for i in starts] for part in (made.ids, made.confidences))
    )
    if joined.parents is None or joined.parents.tolist() != made.parents.tolist():
        return None
    fewer = ([part[i : i + min(width, each)] for i in starts] for part in (made.ids, made.confidences))
    return LazyDrafts.joined(*fewer)


def _evaluated(made: LazyDrafts) -> LazyDrafts:
    mx.eval([part for part in (made.ids, made.confidences, made.parents) if part is not None])
    return made


def _step_of(attached: AttachedModel, example: Example, states: States, place: int, width: int) -> Verified:
    """A step that verifies nothing, whose pending token is the text's at `place`."""
    source, tokens = source_of(attached), example.tokens
    assert source is not None
    k = source.drafts
    layout = Layout(0, (k,), width=width) if source.places_slots else Layout(0, (0,), k, width=width)
    slots = states.slots[place - example.loss_start + 1]
    real = mx.zeros((1, slots.shape[-1]), dtype=slots.dtype)  # which no drafter reads
    return Verified(
        layout=layout,
        shape=block_shape(0, layout.slots, attached.lead),
        hidden=mx.concatenate([real, slots]),
        head_input=states.read[place][None, None],
        logits=mx.zeros((1, 0)),
        picks=mx.array([tokens[place + 1]], dtype=mx.int32),
        accepted=mx.array(0, dtype=mx.int32),
        last=mx.array(0, dtype=mx.int32),
        position=mx.array(place + 1, dtype=mx.int32),
        history=None,
        tokens=tokens[: place + 1],
    )


Proposals = SlotProposals | ChainProposals


def proposals_of(attached: AttachedModel, example: Example, states: States) -> Proposals:
    """What a model's drafter proposes behind every token of an answer."""
    source = source_of(attached)
    kind = SlotProposals if source is not None and source.places_slots else ChainProposals
    return kind(attached, example, states)
