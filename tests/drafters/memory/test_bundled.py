"""The memory that comes with the embedded model: found by its name, used where lookup is by default, turned off."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtp_mlx.api import load
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.memory.loading import open_texts
from mtp_mlx.drafters.memory.memory_file import MemoryFile
from mtp_mlx.drafters.memory.options import MemoryLearning, MemoryLoading
from mtp_mlx.drafters.memory.remember import tokenizer_of
from mtp_mlx.drafters.memory.source import Memory
from mtp_mlx.drafters.memory.vocabulary import vocabulary_fingerprint
from mtp_mlx.drafters.registry import LoadContext
from mtp_mlx.errors import MTPError
from mtp_mlx.files import cache_dir
from mtp_mlx.models import bundled_memory
from mtp_mlx.planning.choose import DrafterChoice, choose_drafters, plan_drafting
from tests.decode.fakes import attached
from tests.drafters.memory.tables import memory_of
from tests.planning.test_choose import bare
from tests.tiny import VOCABULARY, save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    """A memory that was found, not named."""
    file = memory_of(tmp_path / "a.mem", [([1, 2, 3], 0)], vocabulary_fingerprint(tiny_tokenizer()))
    return Memory(file, VOCABULARY, named=False)


def test_it_ships_and_is_small() -> None:
    path = bundled_memory("smollm2-135m")
    assert path is not None and bundled_memory("another") is None
    file = MemoryFile(path)
    assert path.stat().st_size <= 1_000_000 and file.header.tokens > 400_000 and len(file.table()) > 90_000


@pytest.mark.skipif(
    not list((cache_dir() / "models").glob("smollm2-135m-*")), reason="no demo model in the cache"
)
def test_it_belongs_to_the_embedded_model() -> None:
    path = bundled_memory("smollm2-135m")
    assert path is not None
    assert MemoryFile(path).header.vocabulary == vocabulary_fingerprint(tokenizer_of("smollm2-135m"))


@pytest.mark.parametrize(
    ("layout", "lookup", "used"),
    [("auto", None, True), ("tree", None, True), ("linear", None, False), ("plain", None, False)]
    + [("auto", False, False), ("auto", True, False), ("linear", True, False), ("tree", False, False)],
)
def test_where_a_memory_that_was_found_is_used(
    memory: Memory, layout: Any, lookup: bool | None, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where lookup works by default, and nothing was said about lookup; one that was named is used everywhere."""
    for model in (bare(), attached("llama")):
        monkeypatch.setattr(model, "text_source", memory)
        assert choose_drafters(model, None, lookup, layout).texts == used
        monkeypatch.setattr(memory, "named", True)
        assert choose_drafters(model, None, lookup, layout).texts
        monkeypatch.setattr(memory, "named", False)
    assert choose_drafters(model, "memory", None, layout) == DrafterChoice(False, False, True)
    assert not choose_drafters(model, "slots", None, layout).texts


def test_no_word_of_it_where_it_is_not_used(memory: Memory) -> None:
    model, stats = bare(), DecodeStats()
    model.text_source = memory
    assert plan_drafting(model, "plain", None, stats).lookup is None and not stats.fallbacks
    assert plan_drafting(model, "tree", None, stats).lookup is not None and not stats.fallbacks
    memory.named = True
    assert plan_drafting(model, "plain", None, stats).lookup is None and stats.fallbacks


def test_found_named_and_off(memory: Memory, tmp_path: Path) -> None:
    context = LoadContext(tiny_model("llama"), tiny_tokenizer(), False, tmp_path / "a.mem")
    other = memory_of(tmp_path / "b.mem", [], vocabulary_fingerprint(tiny_tokenizer())).path

    def opened(name: str | None, learns: bool = False) -> Memory | None:
        return open_texts(MemoryLoading(name), MemoryLearning(learns), context)

    found, named = opened(None), opened(str(other))
    assert found is not None and not found.named and found._file.path == tmp_path / "a.mem"
    assert named is not None and named.named and named._file.path == other
    assert opened("off") is None
    with pytest.raises(MTPError, match="needs a file to learn into"):
        opened(None, learns=True)  # the one that ships is everybody's


def test_load_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Memory) -> None:
    folder = save_tiny(tmp_path / "model", "llama", seed=3)
    asked = SimpleNamespace(names=[])
    monkeypatch.setattr(
        "mtp_mlx.api.bundled_memory", lambda name: asked.names.append(name) or tmp_path / "a.mem"
    )
    assert load(str(folder), None)[0].text_source.named is False
    assert load(str(folder), None, memory="off")[0].text_source is None and asked.names == [str(folder)] * 2
