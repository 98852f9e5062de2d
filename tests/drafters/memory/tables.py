"""Counts of n-grams without NumPy, and memories made of token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mtp_mlx.drafters.memory.corpus import Texts
from mtp_mlx.drafters.memory.memory_file import Header, MemoryFile, append
from mtp_mlx.drafters.memory.ngrams import HASH_BITS, LONGEST, OTHERS, TOKEN_BITS, Table, counted
from mtp_mlx.drafters.memory.running_text import contexts_of

Text = tuple[list[int], int]  # tokens, and the index from where they are counted


def counts_of(texts: Sequence[Text]) -> Table:
    """The table of some texts."""
    joined = Texts()
    for tokens, start in texts:
        joined.add(list(tokens), start)
    return counted(*joined.arrays())


def memory_of(
    path: Path, texts: Sequence[Text], vocabulary: str = "tiny", most: int = 64_000_000
) -> MemoryFile:
    """A file of some texts, or one with them added."""
    append(path, counts_of(texts), Header(vocabulary, sum(len(t) - s for t, s in texts), most))
    return MemoryFile(path)


def naive_counts(texts: Sequence[Text]) -> Counter[tuple[int, int]]:
    """{(context, token): how often}, one token after the other."""
    found: Counter[tuple[int, int]] = Counter()
    for tokens, start in texts:
        for place in range(start, len(tokens)):
            for context in contexts_of(tokens[:place]):
                found[context, tokens[place]] += 1
    return found


def as_counter(table: Table) -> Counter[tuple[int, int]]:
    """The same of a table."""
    pairs = zip(table.keys.tolist(), table.counts.tolist(), strict=True)
    return Counter({(key >> TOKEN_BITS, key & OTHERS): count for key, count in pairs})


def size_of(context: int) -> int:
    """Tokens of a context."""
    size = context >> HASH_BITS
    assert 1 <= size <= LONGEST
    return size


def is_sorted(table: Table) -> bool:
    """Whether keys ascend strictly and every count is at least 1."""
    return bool((table.keys[1:] > table.keys[:-1]).all() and (np.asarray(table.counts) > 0).all())
