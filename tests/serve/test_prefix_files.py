"""The prefix cache on disk survives a restart, keeps to its size, and reads nothing that is damaged or another's."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache

from mtp_mlx import files as kept
from mtp_mlx import prompt_cache
from mtp_mlx.decode.session import CacheSettings
from mtp_mlx.model.attach import attach
from mtp_mlx.serve import prefix_cache
from mtp_mlx.serve.prefix_cache import PrefixCache
from mtp_mlx.serve.prefix_files import PrefixFiles, made_by
from tests.serve.running import serving
from tests.serve.test_message_ends import FIRST, SECOND, said, saved_model, settings
from tests.serve.test_prefix_cache import filled, state_of
from tests.tiny import tiny_model

OURS, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_5", "gemma3"])
def test_a_chat_goes_on_after_a_restart(architecture: str, tmp_path: Path) -> None:
    root, folder = saved_model(tmp_path, architecture), tmp_path / "kept"
    with serving(root, engine=settings(0)) as server:
        right = [said(server, turn) for turn in (FIRST, FIRST + SECOND)]
    with serving(root, engine=settings(1 << 24), folder=folder) as server:
        assert said(server, FIRST) == right[0]
    assert folder.stat().st_mode & 0o777 == 0o700
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(load_prompt_cache(str(path))) >= len(prompt_cache.read(path)[0])  # mlx-lm reads it too
    with serving(root, engine=settings(1 << 24), folder=folder) as server:
        text, length, cached = said(server, FIRST + SECOND)
        assert (text, length) == right[1][:2] and right[0][1] - 10 < cached < length
        assert "mtp_mlx_prefix_files_read_total 1" in server.ask("/metrics")[1]


def test_texts_are_written_when_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "SAVE_AFTER", 0.01)
    root, folder = saved_model(tmp_path, "qwen3"), tmp_path / "kept"
    with serving(root, engine=settings(1 << 24), folder=folder) as server:
        said(server, FIRST)
        for _ in range(500):
            if list(folder.glob("[!.]*")):
                break
            time.sleep(0.01)
        assert list(folder.glob("[!.]*"))


def stored(folder: Path, budget: int = 1 << 20, by: str = OURS) -> PrefixCache:
    return PrefixCache(1 << 20, PrefixFiles(folder, budget, by, "tiny"))


def keep(cache: PrefixCache, tokens: list[int], ends: list[int]) -> None:
    earlier = [(n, [state_of(tokens[:n]), None, None]) for n in ends]
    cache.store(tokens, [state_of(tokens), *filled(tokens)], earlier)
    cache.save_all()


def test_what_is_read_back_is_what_was_kept(tmp_path: Path) -> None:
    keep(stored(tmp_path), [1, 2, 3, 4, 5], [2, 4])
    for prompt, length in (([1, 2, 3, 4, 9, 9], 4), ([1, 2, 9], 2), ([1, 9, 9], 0), ([1, 2, 3, 4, 5, 6], 5)):
        found, reached = stored(tmp_path).fetch(prompt, 1)
        assert reached == length
        if found is not None:
            assert found[0][0][0].tolist() == prompt[:length]
            assert np.array(found[1].keys_and_values()[0])[0, 0, :, 0].tolist() == prompt[:length]
    plain = stored(tmp_path / "plain")
    plain.store([1, 2, 3, 4], filled([1, 2, 3, 4]))
    plain.save_all()
    assert stored(tmp_path / "plain").fetch([1, 2, 3, 9, 9], 1)[1] == 3  # keys and values alone: any length


def test_a_longer_text_takes_the_place_of_a_shorter_one(tmp_path: Path) -> None:
    cache = stored(tmp_path)
    keep(cache, [1, 2, 3], [2])
    keep(cache, [1, 2, 3, 4], [])
    assert len(list(tmp_path.iterdir())) == 1 and stored(tmp_path).fetch([1, 2, 9], 1)[1] == 2
    keep(cache, [1, 2, 9], [])
    assert len(list(tmp_path.iterdir())) == 2


def test_the_folder_keeps_its_size_and_counts_those_of_others(tmp_path: Path) -> None:
    keep(stored(tmp_path, by=OTHER), [9, 8, 7, 6], [])
    (theirs,) = tmp_path.iterdir()
    os.utime(theirs, (1, 1))
    size = theirs.stat().st_size
    cache = stored(tmp_path, int(2.5 * size))
    for start in range(3):
        keep(cache, [start, 8, 7, 6], [])
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2.5 * size
        assert theirs.exists() == (start == 0)
    assert stored(tmp_path).fetch([2, 8, 7, 6, 5], 1)[1] == 4
    assert stored(tmp_path).fetch([0, 8, 7, 6, 5], 1)[1] == 0  # the oldest is gone
    before = set(tmp_path.iterdir())
    keep(stored(tmp_path, size // 2), [3] * 40, [])  # larger than the folder may be
    assert set(tmp_path.iterdir()) == before


def test_files_of_others_and_damaged_ones_are_ignored_in_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_warned", {})
    keep(stored(tmp_path), [1, 2, 3, 4], [])
    (path,) = tmp_path.iterdir()
    other = stored(tmp_path, by=OTHER)
    assert other.fetch([1, 2, 3, 4, 5], 1) == (None, 0)
    assert "also holds prompt caches of another model" in caplog.text
    renamed = tmp_path / path.name.replace(OURS, OTHER)
    renamed.write_bytes(path.read_bytes())
    assert stored(tmp_path, by=OTHER).fetch([1, 2, 3, 4, 5], 1) == (None, 0)
    assert "is of another model than its name says" in caplog.text
    whole = stored(tmp_path)
    path.write_bytes(path.read_bytes()[:-50])  # after it was looked at
    assert whole.fetch([1, 2, 3, 4, 5], 1) == (None, 0) and f"{path} is damaged" in caplog.text
    kept._warned.clear()
    caplog.clear()
    path.write_bytes(b"nothing")
    assert len(stored(tmp_path).files or ()) == 0 and f"{path} is damaged" in caplog.text
    (tmp_path / "notes.txt").write_text("mine")
    left = tmp_path / f".{path.stem}.1.2.safetensors"
    left.write_text("half")
    os.utime(left, (1, 1))
    stored(tmp_path)
    assert not left.exists() and (tmp_path / "notes.txt").exists()


def test_a_disk_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_warned", {})
    cache = stored(tmp_path / "kept")
    (tmp_path / "kept").rmdir()
    (tmp_path / "kept").write_text("a file now")
    keep(cache, [1, 2, 3], [])
    keep(cache, [5, 2, 3], [])
    assert caplog.text.count("are not kept for after a restart") == 1
    assert cache.fetch([1, 2, 3, 4], 1)[1] == 3


def test_what_made_a_cache_has_a_name_of_its_own() -> None:
    def named(seed: int, **how: Any) -> str:
        attached = attach(tiny_model("llama", seed=seed))
        try:
            return made_by(attached, CacheSettings(**how))
        finally:
            attached.detach()

    assert named(3) == named(3) and len({named(3), named(4), named(3, kv_bits=8)}) == 3
