"""Decoding in several processes at once: process 0 decides, the others follow.

Every process runs the same passes over its part of the model. What a pass contains must be the same everywhere, or
the parts do not fit; so picks and drafts are process 0's (`led`, inside the lazy graph), and so is every decision
that depends on measured time (`LedPolicy`).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Policy, Proposal
from mtp_mlx.distributed import Peers


def led(peers: Peers, values: mx.array) -> mx.array:
    """Process 0's values, lazily; any shape, the same in every process. Free for one process alone."""
    if peers.alone or not values.size:
        return values
    # The others' values are computed too: the collectives on the way to them must run everywhere, in one order.
    own = mx.where(mx.array(peers.leads), values, mx.zeros_like(values))
    return mx.distributed.all_sum(own, group=peers.group)


class LedPolicy:
    """Process 0's policy for all; the others' own is not asked."""

    def __init__(self, own: Policy, peers: Peers) -> None:
        self._own, self._peers = own, peers
        self.max_drafts, self.own_drafts = own.max_drafts, own.own_drafts

    @property
    def verdict(self) -> str:
        """See `Policy`."""
        return self._own.verdict

    def begin(self, context: int) -> None:
        """See `Policy`."""
        if self._peers.leads:
            self._own.begin(context)

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`; the proposals are the same in every process."""
        told = None
        if self._peers.leads:
            proposal, layout = self._own.choose(proposals)
            told = [proposal.source, len(proposal.drafts), layout.drafts, layout.slots, layout.chain]
        source, count, drafts, slots, chain = self._peers.gather(told)[0]
        chosen = next(proposal for proposal in proposals if proposal.source == source)
        return chosen.cut(count), Layout(drafts, tuple(slots), chain)

    def observe(self, proposal: Proposal, layout: Layout, n_accepted: int, seconds: float) -> None:
        """See `Policy`."""
        if self._peers.leads:
            self._own.observe(proposal, layout, n_accepted, seconds)

    def interrupts_plain(self) -> bool:
        """See `Policy`."""
        return bool(self._peers.gather(self._peers.leads and self._own.interrupts_plain())[0])


def led_policy(own: Policy, peers: Peers) -> Policy:
    """`own`, or process 0's where there are several."""
    return own if peers.alone else LedPolicy(own, peers)
