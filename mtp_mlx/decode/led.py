"""Decoding in several processes at once: process 0 decides, the others follow.

Every process runs the same passes over its part of the model, and each pass must have the same rows everywhere. All
processes therefore use the picks and drafts of process 0 (`led`, inside the lazy graph) and its decisions where those
depend on measured time (`LedPolicy`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Policy, Proposal
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.distributed import Peers


def led(peers: Peers, values: mx.array) -> mx.array:
    """Process 0's values, lazily. The shape is any, but the same in every process. Free in a single process."""
    if peers.alone or not values.size:
        return values
    # The other processes' values are computed too: their collectives must run everywhere, in the same order.
    own = mx.where(mx.array(peers.leads), values, mx.zeros_like(values))
    return mx.distributed.all_sum(own, group=peers.group)


class LedPolicy:
    """Makes every process follow the policy of process 0; the policies of the others are not used."""

    def __init__(self, own: Policy, peers: Peers) -> None:
        self._own, self._peers = own, peers
        self.max_drafts, self.own_drafts = own.max_drafts, own.own_drafts

    @property
    def verdict(self) -> str:
        """See `Policy`."""
        return self._own.verdict

    def begin(self, context: int, *, branches: bool = True) -> None:
        """See `Policy`."""
        if self._peers.leads:
            self._own.begin(context, branches=branches)

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`; the proposals are the same in every process."""
        told = None
        if self._peers.leads:
            proposal, layout = self._own.choose(proposals)
            told = [*_told(proposal), *dataclasses.astuple(layout)]
        source, tokens, parents, chances, sources, *values = self._peers.gather(told)[0]
        tree = DraftTree(tuple(tokens), tuple(parents), tuple(chances))
        drafts, slots, chain, branches, width = values
        return Proposal(source, tree, tuple(sources)), Layout(
            drafts, tuple(slots), chain, tuple(branches), width
        )

    def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        """See `Policy`."""
        if self._peers.leads:
            self._own.observe(proposal, layout, tokens, seconds)

    def interrupts_plain(self) -> bool:
        """See `Policy`."""
        return bool(self._peers.gather(self._peers.leads and self._own.interrupts_plain())[0])


def _told(proposal: Proposal) -> list[Any]:
    """A proposal as plain values."""
    tree = proposal.tree
    return [proposal.source, tree.tokens, tree.parents, tree.chances, proposal.sources]


def led_policy(own: Policy, peers: Peers) -> Policy:
    """`own` in a single process; otherwise a policy that follows process 0."""
    return own if peers.alone else LedPolicy(own, peers)
