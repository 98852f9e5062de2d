"""Counts of n-grams: which token followed the last 1 to `LONGEST` tokens, and how often.

A table is two arrays, sorted by key. A key holds, from its high bits, the number of tokens of the context (3 bits), a
hash of these tokens (37 bits) and the token that followed (24 bits), so that all that followed a context lies side by
side. Contexts whose hashes are equal share their counts; with a million contexts one lookup in a hundred thousand
meets such a stranger, and a wrong draft costs no more than any other.

Only `MOST_FOLLOWERS` tokens of a context are kept, the most frequent ones. What the others counted goes to `OTHERS`,
a token that no vocabulary has, so that the counts of a context still add up.

Legend: N tokens of text, E entries of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LONGEST = 6  # tokens of the longest context
TOKEN_BITS, HASH_BITS = 24, 37
OTHERS = (1 << TOKEN_BITS) - 1  # stands for all followers of a context that were left out
MOST_FOLLOWERS = 8
SEED, FACTOR, MASK = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, (1 << 64) - 1
_SLACK = 0.9  # a table that is too large is cut to this share, so that the next text need not cut it again


@dataclass(frozen=True)
class Table:
    """Counts of n-grams.

    Attributes:
        keys: [E] uint64, strictly ascending.
        counts: [E] uint32, at least 1.
    """

    keys: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @staticmethod
    def empty() -> Table:
        """A table without entries."""
        return Table(np.zeros(0, np.uint64), np.zeros(0, np.uint32))


def extended(state: int, token: int) -> int:
    """The hash state of a context with one more token in front of it; that of no tokens is `SEED`."""
    state = ((state ^ token) * FACTOR) & MASK
    return state ^ (state >> 32)


def context_of(size: int, state: int) -> int:
    """The key, without its token, of a context of `size` tokens with this hash state."""
    return (size << HASH_BITS) | (state >> (64 - HASH_BITS))


def counted(tokens: np.ndarray, reach: np.ndarray) -> Table:
    """Counts the n-grams of texts that stand one behind the other.

    Args:
        tokens: [N] token ids of all texts, below `OTHERS`.
        reach: [N] for each token, how many tokens before it belong to its context; 0 if it is not counted.
    """
    ids, reach = tokens.astype(np.uint64), np.minimum(reach, LONGEST)
    state = np.full(len(ids), SEED, np.uint64)
    keys, counts = [], []
    for size in range(1, LONGEST + 1):
        state = state[1:] ^ ids[: len(ids) - size]  # of the contexts that end before tokens[size:]
        state *= np.uint64(FACTOR)
        state ^= state >> np.uint64(32)
        counts_here = reach[size:] >= size
        if not counts_here.any():
            break
        context = (state[counts_here] >> np.uint64(64 - HASH_BITS)) | np.uint64(size << HASH_BITS)
        found = np.unique((context << np.uint64(TOKEN_BITS)) | ids[size:][counts_here], return_counts=True)
        keys.append(found[0])
        counts.append(found[1].astype(np.uint32))
    return Table(np.concatenate(keys), np.concatenate(counts)) if keys else Table.empty()


def merged(first: Table, second: Table) -> Table:
    """The counts of two tables together."""
    keys = np.concatenate([first.keys, second.keys])
    order = np.argsort(keys, kind="stable")  # linear time: the tables are sorted
    keys, counts = keys[order], np.concatenate([first.counts, second.counts])[order]
    starts = np.flatnonzero(_changes(keys))
    sums = np.add.reduceat(counts.astype(np.uint64), starts) if len(starts) else counts
    return Table(keys[starts], np.minimum(sums, np.uint64(2**32 - 1)).astype(np.uint32))


def limited(table: Table, most: int, newest: Table | None = None) -> Table:
    """A table of at most `most` entries, and of at most `MOST_FOLLOWERS` for every context.

    The rarest n-grams leave; of equally rare ones the longest, and of these the older.

    Args:
        table: the counts.
        most: entries.
        newest: the counts that were added last.
    """
    table = _without(table, _beyond_most_followers(table))
    kept, named = table, most
    while len(kept) > most:  # `OTHERS` of the contexts that lose a follower need room as well
        named = int(named * _SLACK)
        kept = _without(table, _rarest(table, named, newest))
    return kept


def _changes(values: np.ndarray) -> np.ndarray:
    """[E] bool: whether a value differs from the one before it; True for the first."""
    different = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=different[1:])
    return different


def _is_others(keys: np.ndarray) -> np.ndarray:
    return (keys & np.uint64(OTHERS)) == OTHERS


def _beyond_most_followers(table: Table) -> np.ndarray:
    """[E] bool: the rarest followers of contexts that have too many."""
    leaving = np.zeros(len(table), bool)
    contexts = table.keys >> np.uint64(TOKEN_BITS)
    starts = np.flatnonzero(_changes(contexts))
    sizes = np.diff(np.append(starts, len(table)))
    many = np.flatnonzero(np.repeat(sizes > MOST_FOLLOWERS, sizes))
    if not len(many):
        return leaving
    counts = np.where(_is_others(table.keys[many]), np.int64(1 << 40), table.counts[many].astype(np.int64))
    order = many[np.lexsort((-counts, contexts[many]))]
    first = np.flatnonzero(_changes(contexts[order]))
    rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    leaving[order[rank >= MOST_FOLLOWERS - 1]] = True  # one place is for `OTHERS`
    return leaving


def _rarest(table: Table, most: int, newest: Table | None) -> np.ndarray:
    """[E] bool: all followers with a name but the `most` that leave last."""
    sizes = (table.keys >> np.uint64(TOKEN_BITS + HASH_BITS)).astype(np.int64)
    worth = (table.counts.astype(np.int64) << 4) | ((LONGEST - sizes) << 1)
    if newest is not None and len(newest):
        place = np.minimum(np.searchsorted(newest.keys, table.keys), len(newest) - 1)
        worth |= newest.keys[place] == table.keys
    leaving = ~_is_others(table.keys)  # these leave with the last follower of their context
    places = np.flatnonzero(leaving)
    if most >= len(places):
        leaving[:] = False
    elif most:
        leaving[places[np.argpartition(worth[places], -most)[-most:]]] = False
    return leaving


def _without(table: Table, leaving: np.ndarray) -> Table:
    """The table without some entries; in contexts that keep others, what they counted goes to `OTHERS`."""
    if not leaving.any():
        return table
    contexts = table.keys >> np.uint64(TOKEN_BITS)
    starts = np.flatnonzero(_changes(contexts))
    named = ~leaving & ~_is_others(table.keys)
    alive = np.add.reduceat(named.astype(np.int64), starts) > 0  # contexts that still have a follower
    lost = np.add.reduceat(np.where(leaving, table.counts, 0).astype(np.uint64), starts)
    stays = ~leaving & np.repeat(alive, np.diff(np.append(starts, len(table))))
    kept = Table(table.keys[stays], table.counts[stays])
    short = alive & (lost > 0)
    others = (contexts[starts[short]] << np.uint64(TOKEN_BITS)) | np.uint64(OTHERS)
    return merged(kept, Table(others, np.minimum(lost[short], 2**32 - 1).astype(np.uint32)))
