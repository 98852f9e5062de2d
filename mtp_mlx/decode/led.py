"""Decoding in several processes at once: process 0 decides, the others follow.

Every process runs the same passes over its part of the model, and each pass must have the same rows everywhere. All
processes therefore use the picks and drafts of process 0 (`led`, inside the lazy graph) and its decisions where those
depend on measured time (`LedPolicy`).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Policy, Proposal
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
    """`own` in a single process; otherwise a policy that follows process 0."""
    return own if peers.alone else LedPolicy(own, peers)
