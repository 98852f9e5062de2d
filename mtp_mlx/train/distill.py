"""Self-distillation data: the base model's own answers to prompts, generated in batches and resumable.

The output is a JSONL file to which answers are appended in the order in which they end. A row holds the prompt as it
was read (`prompt` or `messages`), `response`, `response_tokens` (the generated ids, without the eos), `finished`
(false if the answer was truncated at max_tokens), `temperature`, `chat_template_kwargs` if thinking was switched, and
`id`, `category`, `source` and `licence` if the prompt has them. `mtp_mlx.train.data` reads these rows as they are.
Answers that end within their thinking are counted and left out; the next run tries their prompts again.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mtp_mlx.config import setting, trust_setting
from mtp_mlx.errors import MTPError
from mtp_mlx.files import clear_errors
from mtp_mlx.train.distill_rows import (
    Answer,
    Prompt,
    answer_row,
    encode_prompt,
    read_answered,
    read_prompts,
    repair_last_line,
    thoughts_of,
)

PREFILL_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """Settings of `mtp-mlx distill`."""

    model: str = setting(
        "smollm2-135m", help="Model that answers: smollm2-135m, a folder or a hub id", flag="-m"
    )
    trust_remote_code: bool = trust_setting()
    prompts: Path = setting(help="JSONL file with prompts", flag="-p")
    out: Path = setting(help="JSONL file to append answers to", flag="-o")
    max_tokens: int = setting(256, help="Maximum length of an answer in tokens", minimum=1)
    temp: float = setting(0.0, help="Sampling temperature; 0 = greedy", minimum=0)
    batch_size: int = setting(8, help="Prompts answered at once", minimum=1)
    thinking: Literal["auto", "on", "off"] = setting("auto", help="Switch the model's thinking on or off")
    thoughts: Literal["keep", "drop"] = setting("keep", help="Keep thinking in the answers, or drop it")
    limit: int | None = setting(None, help="Use only the first prompts of the file, this many", minimum=1)
    seed: int = setting(0, help="Seed of the sampling noise", minimum=0)


@dataclass
class DistillSummary:
    """What a run did.

    Attributes:
        out: path of the output.
        written: answers written.
        finished: of these, answers that the model ended itself.
        skipped: prompts that were answered before.
        unended: answers left out because their thinking has no end.
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
    unended: int = 0
    duplicates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with tokens per second."""
        return {**asdict(self), "tok_per_s": self.tokens / self.seconds if self.seconds else 0.0}


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


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[Prompt],
    settings: DistillSettings,
    on_tokens: Callable[[int], None] = lambda count: None,
    options: dict[str, Any] | None = None,
) -> Iterator[Answer]:
    """Answers in the order in which they end, by mlx-lm's continuous batching.

    Args:
        options: further variables of the chat template.
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
    active: dict[int, Answer] = {}
    try:
        while waiting or active:
            while waiting and len(active) < 2 * settings.batch_size:  # the rest need no cache yet
                prompt = waiting.popleft()
                sampler = _sampler(settings, prompt)
                ids = encode_prompt(prompt, tokenizer, vocab_size, options)
                warn_beyond(model, len(ids))
                (uid,) = batch.insert([ids], samplers=None if sampler is None else [sampler])
                active[uid] = Answer(prompt, ids, [], finished=False)
            responses = batch.next_generated()
            on_tokens(len(responses))
            for response in responses:
                if response.finish_reason != "stop":
                    active[response.uid].tokens.append(int(response.token))
                if response.finish_reason is not None:
                    answer = active.pop(response.uid)
                    yield replace(answer, finished=response.finish_reason == "stop")
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
        on_answer: called with every answer, once it is written or left out.

    Raises:
        MTPError: the prompts or the output cannot be used, or the disk is full.
    """
    summary = DistillSummary(out=str(settings.out), note=repair_last_line(settings.out))
    prompts = list(read_prompts(settings.prompts, settings.limit))
    if not prompts:
        raise MTPError(
            f'{settings.prompts}: the file is empty. Write one JSON object with "prompt" per line.'
        )
    thoughts = thoughts_of(tokenizer, settings.thinking, kept=settings.thoughts == "keep")
    pending = _pending(prompts, read_answered(settings.out), summary)
    on_start(len(pending), summary)
    started = time.perf_counter()

    def counted(count: int) -> None:
        summary.tokens += count
        on_tokens(count)

    try:
        with _opened(settings.out) as file:
            for answer in generate_answers(model, tokenizer, pending, settings, counted, thoughts.asked):
                row = answer_row(answer, tokenizer, settings.temp, thoughts)
                if row is None:
                    summary.unended += 1
                else:
                    _append(file.fileno(), settings, row)
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
