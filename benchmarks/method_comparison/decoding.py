"""Decodes every prompt with every contestant, and saves each measurement immediately."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from method_comparison.contestants import SAMPLED
from method_comparison.plan import Plan
from method_comparison.settings import CompareSettings
from mtp_mlx.errors import MTPError


def measure(plan: Plan, console: Console) -> list[Decoded]:
    """Measure every contestant on every prompt at both temperatures, and plain decoding with the same noise."""
    from mtp_mlx.measure.prompts import read_prompts

    settings = plan.settings
    prompts = [prompt.text for prompt in read_prompts(settings.prompts, settings.limit)]
    kept = Kept(settings.out / "measured.jsonl", plan.key(prompts))
    contestants = settings.contestants
    noises = sorted({one.noise for one in contestants})
    runs = [Run("plain", None, 0.0, "gumbel"), *(Run("plain", None, SAMPLED, noise) for noise in noises)]
    runs += [Run(one.name, settings.folder(one), t, one.noise) for one in contestants for t in (0.0, SAMPLED)]
    with Progress(console=console) as progress:
        task = progress.add_task("decoding", total=len(runs) * len(prompts))
        for run in runs:
            progress.update(task, description=f"{run.name} at {run.temperature:g}")
            decoder: Decoder | None = None
            for index, prompt in enumerate(prompts):
                if kept.get(run.name, run.temperature, run.noise, index) is None:
                    decoder = decoder or Decoder(settings, run)
                    kept.add(decoder(prompt, index))
                progress.advance(task)
    return kept.rows


@dataclass(frozen=True)
class Run:
    """One way to decode: with an adapter, or plainly (adapter None)."""

    name: str
    adapter: Path | None
    temperature: float
    noise: str


@dataclass(frozen=True)
class Decoded:
    """One decoded prompt.

    Attributes:
        tokens: the text, including its end-of-text token.
        counted: tokens of all steps; the last step may give more than are used.
        steps, rows: forward passes after the prompt, and their rows.
        submitted, accepted: drafts by depth, as in `DecodeStats`.
    """

    name: str
    temperature: float
    noise: str
    prompt: int
    tokens: list[int]
    counted: int
    steps: int
    rows: int
    submitted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


class Decoder:
    """Decodes prompts as one `Run` says."""

    def __init__(self, settings: CompareSettings, run: Run) -> None:
        from mtp_mlx.api import load

        self._settings, self._run = settings, run
        self._model, self._tokenizer = load(settings.model, run.adapter)

    def __call__(self, prompt: str, index: int) -> Decoded:
        from mtp_mlx.api import chat_prompt
        from mtp_mlx.decode.loop import mtp_generate_step
        from mtp_mlx.decode.pick import SamplingConfig
        from mtp_mlx.decode.policy import FixedPolicy
        from mtp_mlx.decode.stats import DecodeStats

        run, settings, stats = self._run, self._settings, DecodeStats()
        sampling = SamplingConfig(temperature=run.temperature, seed=settings.seed + index, noise=run.noise)  # type: ignore[arg-type]
        policy = FixedPolicy("plain", 0) if run.adapter is None else FixedPolicy("quadratic", settings.slots)
        steps = mtp_generate_step(
            chat_prompt(self._tokenizer, prompt),
            self._model,
            max_tokens=settings.max_tokens,
            sampling=sampling,
            policy=policy,
            stats=stats,
        )
        tokens: list[int] = []
        with closing(steps):
            for item in steps:
                tokens.append(item.token)
                if item.token in self._tokenizer.eos_token_ids:
                    break
        return Decoded(
            run.name, run.temperature, run.noise, index, tokens, stats.tokens, stats.steps, stats.rows,
            stats.submitted, stats.accepted,
        )  # fmt: skip


class Kept:
    """Measurements saved in a JSONL file.

    Raises:
        MTPError: if the file belongs to another comparison.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self.rows: list[Decoded] = list(self._read())

    def _read(self) -> Iterator[Decoded]:
        if not self._path.exists():
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line being written when the run was killed
            if row.pop("key") != self._key:
                raise MTPError(f"{self._path} has measurements of other settings: choose another --out")
            yield Decoded(**row)

    def get(self, *which: Any) -> Decoded | None:
        """The row of (name, temperature, noise, prompt), or None."""
        return next((r for r in self.rows if (r.name, r.temperature, r.noise, r.prompt) == which), None)

    def add(self, row: Decoded) -> None:
        """Save a row immediately."""
        self.rows.append(row)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": self._key, **asdict(row)}) + "\n")
