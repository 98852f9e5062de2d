"""A memory's file: read back as written, refused when damaged or another tokenizer's, safe with several writers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mtp_mlx.drafters.memory import memory_file
from mtp_mlx.drafters.memory.memory_file import MOST_COUNT, Header, MemoryFile, append
from mtp_mlx.drafters.memory.ngrams import OTHERS, TOKEN_BITS, Table
from mtp_mlx.drafters.memory.running_text import contexts_of
from mtp_mlx.drafters.memory.vocabulary import vocabulary_fingerprint
from mtp_mlx.errors import MTPError
from tests.drafters.memory.tables import as_counter, counts_of, memory_of, naive_counts
from tests.tiny import tiny_tokenizer

TEXT = ([5, 6, 7, 5, 6, 8, 5, 6, 7], 0)
OTHER_TEXT = ([1, 5, 6, 7, 2, 3], 2)


def test_read_back_as_written(tmp_path: Path) -> None:
    file = memory_of(tmp_path / "a.mem", [TEXT])
    assert as_counter(file.table()) == naive_counts([TEXT])
    assert file.followers(contexts_of([5, 6])[-1]) == [(7, 2), (8, 1)]
    assert file.followers(contexts_of([9])[-1]) == []
    assert file.header.tokens == 9 and file.header.entries == len(file.table())


def test_added_to(tmp_path: Path) -> None:
    """Whoever has the file open goes on reading the old one."""
    old = memory_of(tmp_path / "a.mem", [TEXT])
    before = as_counter(old.table())
    new = memory_of(tmp_path / "a.mem", [OTHER_TEXT])
    assert as_counter(new.table()) == naive_counts([TEXT, OTHER_TEXT]) and new.header.tokens == 13
    assert as_counter(old.table()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.mem.lock", "a.mem"]


def test_an_empty_memory(tmp_path: Path) -> None:
    file = memory_of(tmp_path / "a.mem", [])
    assert file.followers(contexts_of([5])[-1]) == [] and not len(file.table())


@pytest.mark.parametrize("most", [1 << 16, 1 << 17])
def test_the_size_is_bounded(tmp_path: Path, most: int) -> None:
    path, rng = tmp_path / "a.mem", np.random.default_rng(0)
    for _ in range(3):
        memory_of(path, [(rng.integers(0, 5000, 9000).tolist(), 0)], most=most)
        assert most // 2 < path.stat().st_size <= most
    append(path, Table.empty(), Header("tiny", 0, 1 << 16))
    assert MemoryFile(path).header.max_bytes == most  # a file keeps its limit
    append(path, Table.empty(), Header("tiny", 0, 1 << 16), newer_limit=True)
    assert path.stat().st_size <= 1 << 16


def test_large_counts_are_halved_together(tmp_path: Path) -> None:
    first, second = contexts_of([5])[0] << TOKEN_BITS, contexts_of([6])[0] << TOKEN_BITS
    counts = {first | 1: 4 * MOST_COUNT, first | 2: MOST_COUNT, first | OTHERS: 1, second | 1: 3}
    keys = sorted(counts)
    table = Table(np.array(keys, np.uint64), np.array([counts[key] for key in keys], np.uint32))
    append(tmp_path / "a.mem", table, Header("tiny", 1, 1 << 20))
    file = MemoryFile(tmp_path / "a.mem")
    kept = file.followers(contexts_of([5])[0])
    assert [token for token, _ in kept] == [1, 2, OTHERS]
    assert kept[0][1] <= MOST_COUNT and abs(kept[0][1] / kept[1][1] - 4) < 0.01 and kept[2][1] == 1
    assert file.followers(contexts_of([6])[0]) == [(1, 3)]


def test_another_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "a.mem"
    memory_of(path, [TEXT])
    before = path.read_bytes()
    with pytest.raises(MTPError, match="another tokenizer"):
        memory_of(path, [TEXT], vocabulary="other")
    assert path.read_bytes() == before


def test_fingerprints_of_tokenizers() -> None:
    """One id that stands for another text is enough."""

    class Changed:
        def get_vocab(self) -> dict[str, int]:
            known = dict(tiny_tokenizer().get_vocab())
            first, second, *_ = known
            return {**known, first: known[second], second: known[first]}

    assert vocabulary_fingerprint(tiny_tokenizer()) == vocabulary_fingerprint(tiny_tokenizer())
    assert vocabulary_fingerprint(tiny_tokenizer()) != vocabulary_fingerprint(Changed())


def damaged(whole: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "other": b"some other file, longer than a header",
        "cut header": whole[:40],
        "no JSON": whole[:16] + b"}" + whole[17:],
        "huge header": whole[:8] + b"\xff" * 8 + whole[16:],
        "cut table": whole[:-1],
        "longer table": whole + b"\0",
        "entries": whole.replace(b'"entries": ', b'"entries":-'),
        "text for a number": whole.replace(b'"tokens": 9', b'"tokens":""'),
        "another longest": whole.replace(b'"longest": 6', b'"longest": 7'),
        "no vocabulary": whole.replace(b'"vocabulary"', b'"vocabularx"'),
    }


@pytest.mark.parametrize("name", damaged(b"0" * 99))
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.mem"
    memory_of(path, [TEXT])
    content = damaged(path.read_bytes())[name]
    assert content != path.read_bytes()
    path.write_bytes(content)
    for use in (lambda: MemoryFile(path), lambda: memory_of(path, [TEXT])):
        with pytest.raises(MTPError, match="make it again|make one") as found:
            use()
        assert str(path) in str(found.value) and "\n" not in str(found.value)
    assert path.read_bytes() == content


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.mem", tmp_path):
        with pytest.raises(MTPError, match="make one with"):
            MemoryFile(path)


WRITER = """
import sys
from pathlib import Path
from tests.drafters.memory.tables import memory_of
path, token = Path(sys.argv[1]), int(sys.argv[2])
for _ in range(20):
    memory_of(path, [([1, 2, token], 0)])
"""


def test_several_processes_add_at_once(tmp_path: Path) -> None:
    """Nothing is lost, and a reader never meets half a file."""
    path = tmp_path / "a.mem"
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(token)], cwd=Path.cwd())
        for token in (3, 4, 5)
    ]
    while any(process.poll() is None for process in running):
        if path.exists():
            MemoryFile(path).followers(contexts_of([1, 2])[-1])
    assert [process.returncode for process in running] == [0, 0, 0]
    assert MemoryFile(path).followers(contexts_of([1, 2])[-1]) == [(3, 20), (4, 20), (5, 20)]
    assert MemoryFile(path).header.tokens == 3 * 20 * 3


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mem"
    memory_of(path, [TEXT])
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(memory_file.os, "fsync", full)
    with pytest.raises(MTPError, match="the disk is full"):
        append(path, counts_of([OTHER_TEXT]), Header("tiny", 4, 1 << 20))
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == [".a.mem.lock", "a.mem"]
