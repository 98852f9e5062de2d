"""The file of a memory: a header, then the table of n-grams, read through a memory map.

    8 bytes   b"MTPMEM1" and a newline
    8 bytes   length of the header, little-endian, a multiple of 64 with these 16 bytes
    header    JSON: `Header`, padded with spaces
    8 E       keys, uint64, little-endian, ascending (`mtp_mlx.drafters.memory.ngrams`)
    2 E       counts, uint16; those of a context that are too large are halved together until they fit

A file is never changed: `append` writes another one beside it and renames that, so whoever has the old one open goes
on reading it. Processes that append take turns, by a lock on a file beside it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mtp_mlx.drafters.memory.ngrams import LONGEST, TOKEN_BITS, Table, limited, merged
from mtp_mlx.errors import MTPError
from mtp_mlx.files import locked, write_file

MAGIC = b"MTPMEM1\n"
ENTRY_BYTES = 10
MOST_COUNT = 65535
LEAST_BYTES = 1 << 16  # smallest size that a file may be limited to
MOST_SOURCES = 256  # files that the header remembers


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        vocabulary: fingerprint of the tokenizer whose ids it holds.
        tokens: tokens that were counted, whether their n-grams are still there or not.
        max_bytes: the largest size that the file may have.
        entries: E.
        longest: tokens of the longest context.
        sources: fingerprints of the files that were read, so that none is counted twice.
    """

    vocabulary: str
    tokens: int
    max_bytes: int
    entries: int = 0
    longest: int = LONGEST
    sources: tuple[str, ...] = ()


class MemoryFile:
    """A file that is open for reading.

    Attributes:
        path: where it is.
        header: what it says about itself.

    Raises:
        MTPError: if there is no such file, or it is not a memory, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                start, self.header = _read_header(file.read(16), file.read, path)
                if size != start + ENTRY_BYTES * self.header.entries:
                    raise MTPError(
                        f"{path} is damaged: {size} bytes are not what it says it has; make it again"
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise MTPError(
                f"{path}: there is no memory that can be read ({error.strerror}); make one with `mtp-mlx remember`"
            ) from error
        entries = self.header.entries
        self._keys = np.frombuffer(self._map, np.dtype("<u8"), entries, start)
        self._counts = np.frombuffer(self._map, np.dtype("<u2"), entries, start + 8 * entries)
        keys = memoryview(self._map)[start : start + 8 * entries]
        self._sought = keys.cast("Q")  # much faster to search than a NumPy array

    def followers(self, context: int) -> list[tuple[int, int]]:
        """[(token, count)] of what followed a context (`ngrams.context_of`), in the order of the tokens."""
        keys, first = self._sought, context << TOKEN_BITS
        last = first + (1 << TOKEN_BITS)
        place = bisect_left(keys, first)
        found = []
        while place < len(keys) and (key := keys[place]) < last:
            found.append((key - first, int(self._counts[place])))
            place += 1
        return found

    def fingerprint(self) -> str:
        """16 hex digits of all of it."""
        return hashlib.sha256(self._map).hexdigest()[:16]

    def table(self) -> Table:
        """All of it, in memory."""
        return Table(np.array(self._keys, np.uint64), np.array(self._counts, np.uint32))


def _read_header(start: bytes, read: Callable[[int], bytes], path: Path) -> tuple[int, Header]:
    """(offset of the table, header).

    Raises:
        MTPError: if it is not the start of a memory.
    """
    if len(start) < 16 or start[:8] != MAGIC:
        raise MTPError(f"{path} is not a memory: make one with `mtp-mlx remember`")
    length = int.from_bytes(start[8:], "little")
    try:
        values: dict[str, Any] = json.loads(read(length) if length < 1 << 24 else b"")
        known = {field.name: values[field.name] for field in fields(Header)}
        header = Header(**{**known, "sources": tuple(known["sources"])})
        numbers = (header.tokens, header.max_bytes, header.entries, header.longest)
        if not isinstance(header.vocabulary, str) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MTPError(f"{path} is damaged: its header cannot be read; make it again") from None
    if header.longest != LONGEST:
        raise MTPError(
            f"{path} counts contexts of up to {header.longest} tokens, and this version of mtp-mlx reads {LONGEST}: "
            "make it again"
        )
    return 16 + length, header


def append(path: Path, news: Table, header: Header, *, newer_limit: bool = False) -> Header:
    """Adds counts to a file, or makes it, and returns the header that it has now.

    Args:
        path: of the file.
        news: the counts.
        header: of the counts alone. `max_bytes` is used for a new file only, `entries` never.
        newer_limit: use `max_bytes` for a file that exists, too.

    Raises:
        MTPError: if the file is not a memory or belongs to another tokenizer, or if it cannot be written.
    """
    with locked(path):
        table = news
        if path.exists():
            old = MemoryFile(path)
            check_vocabulary(old, header.vocabulary)
            table = merged(old.table(), news)
            sources = (*old.header.sources, *header.sources)[-MOST_SOURCES:]
            limit = header.max_bytes if newer_limit else old.header.max_bytes
            header = replace(
                header, tokens=header.tokens + old.header.tokens, max_bytes=limit, sources=sources
            )
        table = limited(table, _most_entries(header), news)
        header = replace(header, entries=len(table))
        write_file(path, lambda temporary: _write(temporary, table, header))
    return header


def check_vocabulary(memory: MemoryFile, vocabulary: str) -> None:
    """Raises MTPError if the ids in a file are those of another tokenizer."""
    if memory.header.vocabulary != vocabulary:
        raise MTPError(
            f"{memory.path} remembers the token ids of another tokenizer ({memory.header.vocabulary}, not "
            f"{vocabulary}): make a memory for this model with `mtp-mlx remember`"
        )


def _most_entries(header: Header) -> int:
    return max((header.max_bytes - len(_head(header))) // ENTRY_BYTES, 0)


def _head(header: Header) -> bytes:
    """The bytes before the table; as long for any number of entries."""
    text = json.dumps(asdict(replace(header, entries=0))).encode()
    length = len(text) + 20
    length += -(16 + length) % 64
    return MAGIC + length.to_bytes(8, "little") + json.dumps(asdict(header)).encode().ljust(length)


def _write(path: Path, table: Table, header: Header) -> None:
    with open(path, "wb") as file:
        file.write(_head(header))
        file.write(table.keys.astype("<u8").data)
        file.write(_small(table).astype("<u2").data)
        file.flush()
        os.fsync(file.fileno())


def _small(table: Table) -> np.ndarray:
    """[E] the counts, where those of a context were halved together until they are at most `MOST_COUNT`."""
    if not len(table):
        return table.counts
    contexts = table.keys >> np.uint64(TOKEN_BITS)
    starts = np.flatnonzero(np.append(True, contexts[1:] != contexts[:-1]))
    largest = np.maximum.reduceat(table.counts, starts)
    halvings = np.zeros(len(starts), np.uint32)
    for _ in range(16):
        halvings += (largest >> halvings) > MOST_COUNT
    per_entry = np.repeat(halvings, np.diff(np.append(starts, len(table))))
    return np.maximum(table.counts >> per_entry, 1)
