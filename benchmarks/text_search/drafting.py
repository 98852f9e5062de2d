"""Drafters that know the text, layouts that change in every step, and a planner that time does not disturb.

Random drafters are almost never right, and real time makes every run another one. So the search replaces what is
drafted (never what is computed to draft it), and what a step costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.lookup import LookupDrafter, TextDrafter
from mtp_mlx.decode.policy import Policy, Proposal
from mtp_mlx.decode.tree import ROOT
from mtp_mlx.drafters.memory.draft import MemoryDrafter
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import BlockShape
from mtp_mlx.planning.choose import Drafting, plan_drafting
from mtp_mlx.planning.cost import StepCost
from mtp_mlx.planning.grow import merged
from tests.tiny import VOCABULARY
from text_search.case import Case
from text_search.models import MOST_DRAFTS

MOST_NODES = 8  # drafts that a mixed layout verifies
ROOM = 64  # positions after the known text for which something is drafted too
COST = StepCost((1, 40), (1, 64), (1.0, 1.5), (1.0, 1.5), (1,), (0.0,), 0.01, (1.0, 1.0))


class KnowingDrafter(Drafter):
    """Runs a real drafter, then drafts the known text instead: each token right with a given probability.

    Args:
        real: the drafter whose rows and states are kept.
        truth: the known text; truth[i] is the token at position start + i.
        start: absolute position of the first token.
        acceptance: probability that a draft is right.
        seed: of the wrong ones.
    """

    def __init__(self, real: Drafter, truth: Sequence[int], start: int, acceptance: float, seed: int) -> None:
        self._real, self.note = real, real.note
        self._rng = rng = np.random.default_rng([seed, start])
        length = start + len(truth) + ROOM
        known = np.concatenate([np.zeros(start), truth, rng.integers(0, VOCABULARY, ROOM + 2 * MOST_DRAFTS)])
        table = np.stack([known[1 + slot : 1 + slot + length] for slot in range(MOST_DRAFTS)], axis=1)
        wrong = rng.random(table.shape) >= acceptance
        table = np.where(wrong, (table + rng.integers(1, VOCABULARY, table.shape)) % VOCABULARY, table)
        self._table = mx.array(table.astype(np.int32))  # [position, drafts for the positions after it]

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter`."""
        own = self._real.propose(verified)
        position = mx.minimum(verified.position, self._table.shape[0] - 1)
        known = self._table[position]
        if own.parents is None:
            return LazyDrafts(known[: own.ids.shape[0]] + 0 * own.ids, own.confidences)
        width = verified.layout.width
        return _grown(known[: own.ids.shape[0] // width], width, 0 * own.ids[0], self._rng)

    def begin(self, prefix: Sequence[int], start: int) -> None:
        """See `Drafter`."""
        self._real.begin(prefix, start)

    def uniforms(self, shape: BlockShape, start: int) -> mx.array | None:
        """See `Drafter`."""
        return self._real.uniforms(shape, start)

    def observe(self, head_input: mx.array, tokens: list[int]) -> None:
        """See `Drafter`."""
        self._real.observe(head_input, tokens)

    def catch_up(self, tokens: list[int]) -> None:
        """See `Drafter`."""
        self._real.catch_up(tokens)

    def commit(self, n_accepted: int) -> None:
        """See `Drafter`."""
        self._real.commit(n_accepted)


def _grown(known: mx.array, width: int, nothing: mx.array, rng: np.random.Generator) -> LazyDrafts:
    """A tree that has the chain `known` [k] as one of its paths, and `width` - 1 siblings of each of its drafts.

    Each draft of the chain stands anywhere among its siblings, and every chance is as good as another.
    """
    ids, parents, parent = [], [], ROOT
    for depth in range(known.shape[0]):
        place = int(rng.integers(width))
        siblings = (mx.arange(width) - place + known[depth]) % VOCABULARY
        ids.append(siblings.astype(mx.int32) + nothing)
        parents += [parent] * width
        parent = depth * width + place
    chances = rng.uniform(0.3, 0.9, len(parents)).astype(np.float32)
    return LazyDrafts(mx.concatenate(ids), mx.array(chances), mx.array(parents, dtype=mx.int32))


class KnowingLookup(LookupDrafter):
    """Proposes the known text with a wrong token now and then, and nothing every other time."""

    def __init__(self, truth: Sequence[int], n_prompt: int, seed: int) -> None:
        super().__init__(3, 1)
        self._truth, self._n_prompt = list(truth), n_prompt
        self._wrong = np.random.default_rng([seed, n_prompt]).random(len(truth) + 1) < 0.25

    def propose(self, most: int) -> tuple[list[int], int]:
        """See `LookupDrafter`."""
        first = len(self._tokens) - self._n_prompt
        if len(self._tokens) % 3 == 0 or first < 0:
            return [], 0
        known = enumerate(self._truth[first : first + most], first)
        return [(token + int(self._wrong[index])) % VOCABULARY for index, token in known], 3


class MixedPolicy:
    """Another layout in every step: plain stretches, any number of drafts, slots behind any of them, any chain."""

    def __init__(self, case: Case, seed: int) -> None:
        own = case.drafter != "none"
        self.max_drafts, self.own_drafts = MOST_NODES, case.drafts if own else 0
        self.verdict = ""
        self._slots, self._rng = case.has_slots, np.random.default_rng(seed)

    def begin(self, context: int, *, branches: bool = True) -> None:
        """Nothing to plan."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        given = [proposal for proposal in proposals if proposal.drafts] or [proposals[0]]
        if len(given) == 2 and self._rng.integers(2):
            given = [merged(given)]
        best = given[int(self._rng.integers(len(given)))]
        best = best.cut(int(self._rng.integers(0, MOST_NODES + 1)))
        count, parents = len(best.drafts), best.tree.parents
        behind = self._rng.integers(0, self.own_drafts + 1, count + 1).tolist()
        if self._slots:
            return best, Layout.tree(parents, behind, int(self._rng.integers(1, 4)))
        return best, Layout(count, (0,) * (count + 1), behind[0], parents)

    def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Every other time."""
        return bool(self._rng.integers(2))


class _SteadyPolicy:
    """A policy that is told the planned time of every step in place of the real one."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        """See `Policy`."""
        self._policy.observe(proposal, layout, tokens, COST.seconds(layout, 0))


def _text_drafter(case: Case, truth: Sequence[int], n_prompt: int) -> TextDrafter:
    if case.lookup == "knowing":
        return KnowingLookup(truth, n_prompt, case.sampling.seed)
    if case.lookup == "memory":
        return MemoryDrafter(None, VOCABULARY, branching=case.layout in ("auto", "tree", "mixed"))
    return LookupDrafter(3, 1)


@contextmanager
def knowing(
    case: Case, model: AttachedModel, truth: Sequence[int], n_prompt: int, start: int
) -> Iterator[None]:
    """Makes what `stream_generate` drafts inside depend on the case alone, and know the text where the case says so.

    Args:
        truth: the text after the prompt.
        n_prompt: tokens of the prompt.
        start: tokens before the text, in the cache and in the prompt.
    """
    seed, acceptance = case.sampling.seed, case.acceptance
    source: Any = model.speculator
    model.experience = None  # what earlier cases have taught the planner

    def planned(*args: Any, **kwargs: Any) -> Drafting:
        found = plan_drafting(*args, **kwargs)
        lookup = found.lookup and _text_drafter(case, truth, n_prompt)
        mixed = case.layout == "mixed"
        policy: Any = MixedPolicy(case, seed) if mixed else _SteadyPolicy(found.policy)
        return Drafting(policy, lookup)

    with ExitStack() as stack:
        patch = stack.enter_context
        patch(mock.patch("mtp_mlx.api.plan_drafting", planned))
        patch(mock.patch("mtp_mlx.planning.choose.step_cost", lambda *_: COST))
        patch(mock.patch("mtp_mlx.planning.choose.prepare_costs", lambda *_: True))
        if source is not None and acceptance is not None:
            real = source.open

            def opened(*args: Any, **kwargs: Any) -> KnowingDrafter:
                return KnowingDrafter(real(*args, **kwargs), truth, start, acceptance, seed)

            patch(mock.patch.object(source, "open", opened))
        yield
