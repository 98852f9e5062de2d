"""The prefix cache on disk: a folder of prompt caches in mlx-lm's format, for after a restart.

A file holds a text with its ends, and is written whole or not at all. Its name begins with the name of what made it:
the model as it computes here, see `made_by`. Files of others are left alone, but count: over the budget, the files
that have not been used for longest are deleted, whoever made them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mtp_mlx import prompt_cache
from mtp_mlx.decode.rollback import is_state, leaves_of
from mtp_mlx.decode.session import CacheSettings
from mtp_mlx.errors import MTPError
from mtp_mlx.files import clear_errors, warn_once
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block
from mtp_mlx.serve.prefix_text import Text, common_length, text_of

log = logging.getLogger("mtp_mlx.serve")

PROBE = 16  # tokens
STALE = 3600.0  # seconds; a temporary file that is older belongs to a process that was killed
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.safetensors")


def made_by(model: AttachedModel, settings: CacheSettings) -> str:
    """16 hex digits that say what makes the caches: weights, fine-tune, precision, and how it all computes here.

    They are a hash of what the model makes of a few tokens, bit for bit, and of the settings of the cache. So what
    differs in anything that changes numbers has another name; the same model may have another name on another
    machine.
    """
    cache = model.make_cache()
    before = model.head_input
    hidden = model.forward(Block.real(mx.array([[n % model.vocab_size for n in range(1, 1 + PROBE)]])), cache)
    model.head_input = before
    digest = hashlib.sha256(
        repr((settings.kv_bits, settings.kv_group_size, settings.quantized_kv_start)).encode()
    )
    states: Any = tree_flatten([layer.state for layer in cache])
    arrays = [one for _, one in states if isinstance(one, mx.array)]
    for array in [hidden, *arrays]:
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()[:16]


@dataclass
class Stored:
    """A file of a text.

    Attributes:
        ends: lengths of the text from which one can go on, the whole length last.
        trims: whether one can go on from any length that is shorter than the first of these.
    """

    path: Path
    tokens: np.ndarray
    ends: tuple[int, ...]
    trims: bool
    nbytes: int

    def reach(self, common: int) -> int:
        """The longest prefix of at most `common` tokens from which one can go on."""
        reached = [end for end in self.ends if end <= common]
        return max(reached, default=common if self.trims else 0)


class PrefixFiles:
    """The texts in a folder. Not thread-safe; other processes may use the folder at the same time.

    Args:
        folder: is made if it does not exist, for the user alone: the files hold what was said.
        budget: most bytes in the folder.
        made_by: as `made_by`.
        model_name: as the user named the model.

    Attributes:
        loads, writes: files read into memory and written.

    Raises:
        MTPError: if the folder cannot be made or listed.
    """

    def __init__(self, folder: Path, budget: int, made_by: str, model_name: str) -> None:
        self.folder, self.budget, self._made_by, self._model_name = folder, budget, made_by, model_name
        self.loads = self.writes = 0
        with clear_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._stored = list(self._scan())

    @property
    def nbytes(self) -> int:
        """Bytes of this model's files."""
        return sum(one.nbytes for one in self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def longest(self, wanted: np.ndarray, least: int, room: int) -> Text | None:
        """Reads the text with the longest usable prefix of `wanted` [T], if that is longer than `least`; else None.

        Args:
            room: most bytes that may be read.
        """
        while True:
            reaches = [
                (one.reach(common_length(one.tokens, wanted)), one)
                for one in self._stored
                if one.nbytes <= room
            ]
            length, found = max(reaches, key=lambda reach: reach[0], default=(0, None))
            if found is None or length <= least:
                return None
            try:
                text = _read(found.path)
            except (MTPError, ValueError):
                self._stored = [one for one in self._stored if one is not found]
                if found.path.exists():  # otherwise another server has deleted it
                    _ignore(found.path, "is damaged")
                continue
            with suppress(OSError):
                os.utime(found.path)
            self.loads += 1
            return text

    def save(self, text: Text) -> None:
        """Writes a text, if it fits, and deletes files whose ends are all in it, and what exceeds the budget.

        Raises:
            MTPError: if it cannot be written.
        """
        if text.nbytes > self.budget:
            return
        tokens = [int(token) for token in text.tokens]
        name = hashlib.sha256(text.tokens.tobytes()).hexdigest()[:16]
        path = self.folder / f"{self._made_by}-{name}.safetensors"
        ends, trims = tuple(end.length for end in text.ends), text.ends[0].trims
        said = prompt_cache.Described(tokens, self._model_name, self._made_by, ends[:-1], trims)
        copies = [copy for end in text.ends[:-1] for copy in end.copies]
        prompt_cache.write(path, text.cache(text.ends[-1], len(tokens)), said, copies)
        os.chmod(path, 0o600)
        self.writes += 1
        new = Stored(path, text.tokens, ends, trims, path.stat().st_size)
        for one in self._stored:
            common = common_length(one.tokens, new.tokens)
            if one.path != path and all(end <= common and new.reach(end) == end for end in one.ends):
                one.path.unlink(missing_ok=True)
        self._stored = [one for one in self._stored if one.path != path and one.path.exists()] + [new]
        self._fit(path)

    def _scan(self) -> Iterator[Stored]:
        """The files of this model; says once how many are of others."""
        others = 0
        for path in sorted(self.folder.iterdir()):
            with suppress(OSError):
                about = path.stat()
                if path.name.startswith(".") and _NAME.match(path.name[1:].split(".")[0] + path.suffix):
                    if time.time() - about.st_mtime > STALE:
                        path.unlink()
                elif _NAME.fullmatch(path.name) and not path.name.startswith(self._made_by):
                    others += 1
                elif _NAME.fullmatch(path.name) and (said := self._described(path)) is not None:
                    tokens = np.array(said.tokens, dtype=np.int64)
                    yield Stored(path, tokens, (*said.ends, len(tokens)), said.trims, about.st_size)
        if others:
            log.warning(
                "%s also holds prompt caches of another model, or of other settings of this one, which are ignored "
                "(files: %d)",
                self.folder,
                others,
            )

    def _described(self, path: Path) -> prompt_cache.Described | None:
        """What a file of this model says; None if it cannot be used, which is said."""
        try:
            said = prompt_cache.describe(path)
        except ValueError:
            _ignore(path, "is damaged")
            return None
        if said.made_by != self._made_by or not said.tokens:
            _ignore(path, "is of another model than its name says")
            return None
        return said

    def _fit(self, newest: Path) -> None:
        """Deletes the files that have not been used for longest until the others fit the budget."""
        files = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                if _NAME.fullmatch(path.name):
                    about = path.stat()
                    files.append((path != newest, -about.st_mtime, about.st_size, path))
        room = self.budget
        for _, _, size, path in sorted(files):
            room -= size
            if room < 0:
                with suppress(OSError):
                    path.unlink()
        self._stored = [one for one in self._stored if one.path.exists()]


def _ignore(path: Path, why: str) -> None:
    warn_once(f"prefix file {path} {why}", f"the prompt cache {path} {why}, and is ignored")


def _read(path: Path) -> Text:
    """The text in a file.

    Raises:
        MTPError, ValueError: if the file is damaged.
    """
    cache, copies, said = prompt_cache.read_all(path)
    states = [is_state(leaf) for leaf in leaves_of(cache)]
    if len(copies) != len(said.ends) * sum(states):
        raise ValueError("some of its states are missing")
    left = iter(copies)
    earlier = [(length, [next(left) if state else None for state in states]) for length in said.ends]
    text = text_of(said.tokens, cache, earlier)
    text.saved = True
    return text
