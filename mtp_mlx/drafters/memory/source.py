"""A memory as a `TextSource`: what a model drafts with beside its own drafter, and what it learns if it is asked to.

Answers are learnt in portions of `PORTION` tokens, each added to the file by a thread of its own: a large file takes
a second or two to write. Drafters that are opened later read the new file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from mtp_mlx.drafters.memory.corpus import Texts
from mtp_mlx.drafters.memory.draft import NAME, MemoryDrafter
from mtp_mlx.drafters.memory.memory_file import Header, MemoryFile, append
from mtp_mlx.drafters.memory.ngrams import LONGEST, counted
from mtp_mlx.errors import MTPError

PORTION = 4096  # tokens

log = logging.getLogger("mtp_mlx")


class Memory:
    """An open memory of one model.

    Args:
        file: of the model's tokenizer.
        vocab_size: V, rows of the model's embedding.
        named: see `TextSource`.
        learns: whether answers are added to the file.

    Attributes:
        learnt: tokens that were added to the file.
    """

    name = NAME

    def __init__(
        self, file: MemoryFile, vocab_size: int, *, named: bool = True, learns: bool = False
    ) -> None:
        self._file, self._vocab_size, self._learns = file, vocab_size, learns
        self.named = named
        self._texts, self._thread = Texts(), threading.Thread()
        self.learnt = 0

    def open(self, *, running_text: bool, branching: bool = False) -> MemoryDrafter:
        """See `TextSource`."""
        return MemoryDrafter(self._file, self._vocab_size, running_text=running_text, branching=branching)

    def learn(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """See `TextSource`."""
        if not self._learns or not answer:
            return
        before = list(prompt[-LONGEST:])
        self._texts.add([*before, *answer], len(before))
        if self._texts.counted >= PORTION and not self._thread.is_alive():
            texts, self._texts = self._texts, Texts()
            self._thread = threading.Thread(target=self._add, args=(texts,), name="mtp-mlx-memory")
            self._thread.start()

    def close(self) -> int:
        """See `TextSource`."""
        if self._thread.ident is not None:
            self._thread.join()
        texts, self._texts = self._texts, Texts()
        if texts.counted:
            self._add(texts)
        return self.learnt

    def _add(self, texts: Texts) -> None:
        """Adds texts to the file; what cannot be written is lost, which is said."""
        header = self._file.header
        try:
            append(
                self._file.path,
                counted(*texts.arrays()),
                Header(header.vocabulary, texts.counted, header.max_bytes),
            )
            self._file = MemoryFile(self._file.path)
            self.learnt += texts.counted
        except MTPError as error:
            log.warning("%d tokens were not learnt: %s", texts.counted, error)
