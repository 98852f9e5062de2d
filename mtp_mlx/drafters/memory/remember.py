"""`mtp-mlx remember`: counts the n-grams of texts and adds them to a memory's file."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtp_mlx.base_model import local_folder, read_tokenizer
from mtp_mlx.drafters.memory.corpus import Texts, examples_in
from mtp_mlx.drafters.memory.memory_file import LEAST_BYTES, Header, MemoryFile, append, check_vocabulary
from mtp_mlx.drafters.memory.ngrams import Table, counted, merged
from mtp_mlx.drafters.memory.options import DEFAULT_SIZE, RememberSettings
from mtp_mlx.drafters.memory.vocabulary import vocabulary_fingerprint
from mtp_mlx.errors import MTPError
from mtp_mlx.model_faults import read_config
from mtp_mlx.train.memory import parsed_size

AT_ONCE = 1 << 21  # tokens that are counted together


@dataclass
class Remembered:
    """What `remember` did.

    Attributes:
        out: the file.
        tokens: tokens that were counted now.
        skipped: files that the memory had read before.
        seconds: how long it took.
        tokens_in_all, entries, bytes: what the file holds now.
    """

    out: str
    tokens: int = 0
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0
    tokens_in_all: int = 0
    entries: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def remember(
    settings: RememberSettings,
    data: Sequence[Path],
    on_tokens: Callable[[int], None] = lambda _: None,
) -> Remembered:
    """Counts the texts of files and adds them to `settings.out`, all at the end or nothing.

    Args:
        settings: see there.
        data: JSONL files of answers or chats, or plain texts.
        on_tokens: called with the number of tokens counted so far.

    Raises:
        MTPError: if a file cannot be read, the model has no tokenizer, or `out` belongs to another tokenizer or
            cannot be written.
    """
    started = time.perf_counter()
    limit = _size(settings.max_size or DEFAULT_SIZE)
    tokenizer = tokenizer_of(settings.model, settings.trust_remote_code)
    vocabulary, known = vocabulary_fingerprint(tokenizer), set[str]()
    if settings.out.exists():
        old = MemoryFile(settings.out)
        check_vocabulary(old, vocabulary)  # before the work
        known = set(old.header.sources)
    report, table, sources = Remembered(str(settings.out)), Table.empty(), []
    for path in data:
        source = _digest(path)
        if source in known:
            report.skipped += (str(path),)
            continue
        known.add(source)
        sources.append(source)
        texts = Texts()
        for example in examples_in(path, tokenizer):
            texts.add(example.tokens, example.loss_start)
            if len(texts) >= AT_ONCE:
                table, texts = _with(table, texts, report, on_tokens), Texts()
        table = _with(table, texts, report, on_tokens)
    header = Header(vocabulary, report.tokens, limit, sources=tuple(sources))
    header = append(settings.out, table, header, newer_limit=settings.max_size is not None)
    report.tokens_in_all, report.entries = header.tokens, header.entries
    report.bytes, report.seconds = settings.out.stat().st_size, time.perf_counter() - started
    return report


def _with(table: Table, texts: Texts, report: Remembered, on_tokens: Callable[[int], None]) -> Table:
    """The table with the counts of texts added."""
    table = merged(table, counted(*texts.arrays()))
    report.tokens += texts.counted
    on_tokens(report.tokens)
    return table


def _size(text: str) -> int:
    try:
        size = parsed_size(text)
    except MTPError:
        raise MTPError(f"`max_size` must be a size such as 64MB, not {text!r}") from None
    if size < LEAST_BYTES:
        raise MTPError(f"`max_size` must be at least {LEAST_BYTES // 1000}kB, not {text!r}")
    return size


def tokenizer_of(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, without its weights.

    Args:
        trust_remote_code: run the code that it may come with.

    Raises:
        MTPError: if there is no such model, or its tokenizer cannot be loaded.
    """
    folder = local_folder(model)
    what = f"the tokenizer of the model {model} could not be loaded"
    try:
        config = read_config(folder)
    except MTPError as error:
        raise MTPError(f"{what}: {error}") from error
    return read_tokenizer(folder, what, config, {"trust_remote_code": True} if trust_remote_code else None)


def _digest(path: Path) -> str:
    """16 hex digits of what a file holds.

    Raises:
        MTPError: if it cannot be read.
    """
    if path.is_dir():
        raise MTPError(f"{path} is a folder: name the files in it")
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise MTPError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return digest.hexdigest()[:16]
