"""What a drafter proposes behind every token of a known answer, by its own code, from the states of the text."""

from __future__ import annotations

import copy
from functools import partial

import mlx.core as mx

from known_text.states import States, greedy_picker
from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified, source_of
from mtp_mlx.decode.layout import Layout
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import block_shape
from mtp_mlx.planning.grow import MOST_CANDIDATES
from mtp_mlx.train.data import Example


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
        self._verified = partial(_step_of, attached, example, states)
        # It remembers nothing between steps.
        self._drafter = source.open(attached, greedy_picker(attached), source.drafts, 0)
        self._known: dict[tuple[int, int], LazyDrafts] = {}

    def behind(self, place: int, width: int) -> LazyDrafts:
        """The drafts after the text's first `place` + 2 tokens are known.

        Args:
            place: of the newest row that is accepted, from the prompt's last token to the last but one.
            width: candidates of a position.
        """
        if (place, width) not in self._known:
            self._known[place, width] = _evaluated(self._drafter.propose(self._verified(place, width)))
        return self._known[place, width]


class ChainProposals:
    """The same of a drafter that drafts after the pass and keeps what it has read, such as heads.

    It walks through the text once, with as many candidates as a step may ask for; steps that ask for fewer draft with
    a copy of what the drafter was at their place.
    """

    def __init__(self, attached: AttachedModel, example: Example, states: States) -> None:
        source = source_of(attached)
        assert source is not None
        self._verified = partial(_step_of, attached, example, states)
        picker, self._first = greedy_picker(attached), example.loss_start - 1
        self._shared = {id(one): one for one in (attached, picker, source, *source.modules())}
        self._drafters: list[Drafter] = []  # that have read the rows before each place
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
            self._known[place, MOST_CANDIDATES] = _evaluated(made)
            drafter.commit(0)

    def behind(self, place: int, width: int) -> LazyDrafts:
        """See `SlotProposals`."""
        if (place, width) not in self._known:
            drafter = self._copy(self._drafters[place - self._first])
            self._known[place, width] = _evaluated(drafter.propose(self._verified(place, width)))
        return self._known[place, width]

    def _copy(self, drafter: Drafter) -> Drafter:
        """The same drafter with caches of its own."""
        return copy.deepcopy(drafter, dict(self._shared))


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
