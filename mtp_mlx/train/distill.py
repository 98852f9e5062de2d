"""Self-distillation data: the base model's own answers to prompts, generated in batches and resumable.

The output is a JSONL file to which answers are appended in the order in which they end. A row holds the prompt as it
was read (`prompt` or `messages`), `response`, `response_tokens` (the generated ids, without the eos), `finished`
(false if the answer was truncated at max_tokens), `temperature`, and `id`, `category`, `source` and `licence` if the
prompt has them. `mtp_mlx.train.data` reads these rows as they are.

A prompt whose answer is in the output is not answered again, so a stopped run resumes. Noise depends on (seed,
prompt, position): a resumed run writes the same answers as an uninterrupted one.

Batches pad prompts on the left, which changes sums in their last bits. So if two tokens are nearly tied, an answer
may differ from one generated alone; both are the model's own.

mlx is imported where it is used, so that `--help` does not wait for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from mtp_mlx.config import setting
from mtp_mlx.errors import MTPError
from mtp_mlx.files import clear_errors
from mtp_mlx.jsonl import read_jsonl
from mtp_mlx.token_ids import check_ids, text_of
from mtp_mlx.train.messages import messages_prompt_ids, prompt_ids, read_messages

COPIED_FIELDS = ("id", "category", "source", "licence", "license")
PREFILL_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """Settings of `mtp-mlx distill`."""

    model: str = setting(
        "smollm2-135m", help="Model that answers: smollm2-135m, a folder or a hub id", flag="-m"
    )
    prompts: Path = setting(help="JSONL file with prompts", flag="-p")
    out: Path = setting(help="JSONL file to append answers to", flag="-o")
    max_tokens: int = setting(256, help="Maximum length of an answer in tokens", minimum=1)
    temp: float = setting(0.0, help="Sampling temperature; 0 = greedy", minimum=0)
    batch_size: int = setting(8, help="Prompts answered at once", minimum=1)
    limit: int | None = setting(None, help="Use only the first prompts of the file, this many", minimum=1)
    seed: int = setting(0, help="Seed of the sampling noise", minimum=0)


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        row: its fields, as they are written to the output.
        where: file and line.
        key: its id, or else its digest; unique in the output.
        digest: hash of its text.
    """

    row: dict[str, Any]
    where: str
    key: str
    digest: str


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        prompt: what was answered.
        tokens: generated ids, without the eos.
        finished: whether the model ended it; false if it was truncated.
    """

    prompt: Prompt
    tokens: list[int]
    finished: bool


@dataclass
class DistillSummary:
    """What a run did.

    Attributes:
        out: path of the output.
        written: answers written.
        finished: of these, answers that the model ended itself.
        skipped: prompts that were answered before.
        duplicates: prompts that are in the file more than once.
        tokens: generated ids.
        seconds: time of generation.
        interrupted: whether it was stopped.
        note: what was repaired in the output, or "".
    """

    out: str
    written: int = 0
    finished: int = 0
    skipped: int = 0
    duplicates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with tokens per second."""
        return {**asdict(self), "tok_per_s": self.tokens / self.seconds if self.seconds else 0.0}


# --- prompts and earlier answers ----------------------------------------------------------------------------


def read_prompts(path: Path, limit: int | None = None) -> Iterator[Prompt]:
    """The prompts of a JSONL file, whose rows have `prompt`, `messages` or `turns`.

    The first of `turns` is the prompt. Assistant messages at the end of `messages` are dropped: the model answers
    itself.

    Raises:
        MTPError: a row has no prompt; with file and line number.
    """
    for number, row in islice(read_jsonl(path), limit):
        where = f"{path}, line {number}"
        asked = _asked(row, where)
        digest = _digest(asked)
        key = str(row["id"]) if row.get("id") is not None else digest
        copied = {name: row[name] for name in COPIED_FIELDS if row.get(name) is not None}
        yield Prompt({**copied, **asked}, where, key, digest)


def _asked(row: dict[str, Any], where: str) -> dict[str, Any]:
    """{"prompt": text} or {"messages": [...]} (with "tools" if given) of a prompt row."""
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list):
            raise MTPError(f'{where}: "messages" must be a list. Fix this row.')
        while messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if not messages:
            raise MTPError(f'{where}: "messages" has nothing to answer. Fix this row.')
        read_messages(messages, where)
        return {"messages": messages} | ({"tools": row["tools"]} if row.get("tools") else {})
    text = row.get("prompt")
    if text is None and isinstance(row.get("turns"), list) and row["turns"]:
        text = row["turns"][0]
    if not isinstance(text, str) or not text.strip():
        raise MTPError(f'{where}: no prompt. The row needs "prompt" (text), "messages" or "turns".')
    return {"prompt": text}


def _digest(asked: dict[str, Any]) -> str:
    """16 hex digits that depend on the prompt's text."""
    text = json.dumps(asked, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def repair_last_line(path: Path) -> str:
    """Drops a last line that was cut off while it was written; returns what was done, in words, or ""."""
    if not path.exists():
        return ""
    with clear_errors(path), path.open("r+b") as file:
        content = file.read()
        if not content or content.endswith(b"\n"):
            return ""
        start = content.rfind(b"\n") + 1
        try:
            json.loads(content[start:])
        except ValueError:
            file.truncate(start)
            return f"{path}: dropped the last line, which was cut off while it was written"
        file.write(b"\n")
    return ""


def read_answered(path: Path) -> dict[str, str]:
    """{key: digest} of every prompt that is answered in the output.

    Raises:
        MTPError: the file does not hold answers.
    """
    answered: dict[str, str] = {}
    if not path.exists():
        return answered
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        if "response" not in row and "messages" not in row:
            raise MTPError(f'{where}: this file does not hold answers (no "response"). Choose another `out`.')
        digest = _digest(_asked(row, where))
        answered[str(row["id"]) if row.get("id") is not None else digest] = digest
    return answered


def _pending(prompts: Iterable[Prompt], answered: dict[str, str], summary: DistillSummary) -> list[Prompt]:
    """The prompts without an answer; counts the others in `summary`."""
    pending: dict[str, Prompt] = {}
    for prompt in prompts:
        known = answered.get(prompt.key)
        if known is not None and known != prompt.digest:
            raise MTPError(
                f"{prompt.where}: {summary.out} answers another prompt under the id {prompt.key!r}. "
                "Choose another `out`, or give this prompt another id."
            )
        twin = pending.get(prompt.key)
        if twin is not None and twin.digest != prompt.digest:
            raise MTPError(
                f"{prompt.where}: the id {prompt.key!r} is also that of {twin.where}. Make ids unique."
            )
        if known is not None:
            summary.skipped += 1
        elif twin is not None:
            summary.duplicates += 1
        else:
            pending[prompt.key] = prompt
    return list(pending.values())


# --- answers ------------------------------------------------------------------------------------------------


def encode_prompt(prompt: Prompt, tokenizer: Any, vocab_size: int | None = None) -> list[int]:
    """Ids of a prompt, as generation makes them.

    Args:
        vocab_size: V, rows of the model's embedding; None: ids are not checked.

    Raises:
        MTPError: with file and line, if the row cannot be used.
    """
    row, where = prompt.row, prompt.where
    if "messages" in row:
        ids = messages_prompt_ids(tokenizer, row["messages"], row.get("tools"), where)
    else:
        try:
            ids = prompt_ids(tokenizer, row["prompt"])
        except MTPError as error:
            raise MTPError(f"{where}: {error}") from error
    if not ids:
        raise MTPError(f"{where}: the tokenizer makes no tokens of the prompt. Delete this row.")
    if vocab_size is not None:
        check_ids(ids, vocab_size, f"{where}: the prompt", tokenizer)
    return ids


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[Prompt],
    settings: DistillSettings,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[Answer]:
    """Answers in the order in which they end, by mlx-lm's continuous batching.

    Args:
        on_tokens: called after every forward pass with the number of ids it generated.
    """
    from mlx_lm.generate import BatchGenerator

    from mtp_mlx.model.context import warn_beyond
    from mtp_mlx.model.seams import embedding_rows

    vocab_size = embedding_rows(model)
    batch = BatchGenerator(
        model,
        max_tokens=settings.max_tokens,
        stop_tokens=[[token] for token in sorted(tokenizer.eos_token_ids)],
        completion_batch_size=settings.batch_size,
        prefill_batch_size=min(settings.batch_size, PREFILL_BATCH_SIZE),
    )
    waiting = deque(prompts)
    active: dict[int, tuple[Prompt, list[int]]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < 2 * settings.batch_size:  # the rest need no cache yet
                prompt = waiting.popleft()
                sampler = _sampler(settings, prompt)
                ids = encode_prompt(prompt, tokenizer, vocab_size)
                warn_beyond(model, len(ids))
                (uid,) = batch.insert([ids], samplers=None if sampler is None else [sampler])
                active[uid] = (prompt, [])
            responses = batch.next_generated()
            on_tokens(len(responses))
            for response in responses:
                prompt, tokens = active[response.uid]
                if response.finish_reason != "stop":
                    tokens.append(int(response.token))
                if response.finish_reason is not None:
                    del active[response.uid]
                    yield Answer(prompt, tokens, response.finish_reason == "stop")
    finally:
        batch.close()


def _sampler(settings: DistillSettings, prompt: Prompt) -> Callable[[Any], Any] | None:
    """Samples id n of an answer from log-probabilities [1, V], with noise of (seed, prompt, n); None if greedy."""
    if settings.temp == 0:
        return None
    import mlx.core as mx

    named = hashlib.sha256(f"{settings.seed} {prompt.digest}".encode()).digest()
    base, position = int.from_bytes(named[:7], "little"), -1

    def sample(logprobs: Any) -> Any:
        nonlocal position
        position += 1
        return mx.random.categorical(logprobs / settings.temp, key=mx.random.key(base + position))

    return sample


def answer_row(answer: Answer, tokenizer: Any, temperature: float) -> dict[str, Any]:
    """The row of the output for an answer."""
    response = text_of(tokenizer, answer.tokens)
    row = dict(answer.prompt.row)
    if "messages" in row:
        row["messages"] = [*row["messages"], {"role": "assistant", "content": response}]
    else:
        row["response"] = response
    return {
        **row,
        "response_tokens": answer.tokens,
        "finished": answer.finished,
        "temperature": temperature,
    }


def distill(
    model: Any,
    tokenizer: Any,
    settings: DistillSettings,
    *,
    on_start: Callable[[int, DistillSummary], None] = lambda pending, summary: None,
    on_tokens: Callable[[int], None] = lambda count: None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> DistillSummary:
    """Answers the prompts that have no answer in `settings.out`, and appends each answer when it ends.

    Ctrl-C keeps the answers written so far, and sets `interrupted`.

    Args:
        on_start: called once with the number of prompts to answer and the summary so far.
        on_tokens: called after every forward pass with the number of ids it generated.
        on_answer: called with every answer that was written.

    Raises:
        MTPError: the prompts or the output cannot be used, or the disk is full.
    """
    summary = DistillSummary(out=str(settings.out), note=repair_last_line(settings.out))
    prompts = list(read_prompts(settings.prompts, settings.limit))
    if not prompts:
        raise MTPError(
            f'{settings.prompts}: the file is empty. Write one JSON object with "prompt" per line.'
        )
    pending = _pending(prompts, read_answered(settings.out), summary)
    on_start(len(pending), summary)
    started = time.perf_counter()

    def counted(count: int) -> None:
        summary.tokens += count
        on_tokens(count)

    try:
        with _opened(settings.out) as file:
            for answer in generate_answers(model, tokenizer, pending, settings, counted):
                _append(file.fileno(), settings, answer_row(answer, tokenizer, settings.temp))
                summary.written += 1
                summary.finished += answer.finished
                on_answer(answer)
    except KeyboardInterrupt:
        summary.interrupted = True
    summary.seconds = time.perf_counter() - started
    return summary


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open to append to it; a new file, and folders made for it, go again if nothing was written."""
    missing = [] if path.exists() else [path, *(folder for folder in path.parents if not folder.exists())]
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    try:
        with file:
            yield file
    finally:
        if missing and path.stat().st_size == 0:
            path.unlink()
            with suppress(OSError):  # somebody may have put something into them
                for folder in missing[1:]:
                    folder.rmdir()


def _append(descriptor: int, settings: DistillSettings, row: dict[str, Any]) -> None:
    """Appends a line in one write, so that a stop leaves whole lines."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    with clear_errors(settings.out):
        while line:
            line = line[os.write(descriptor, line) :]
