"""Trains the methods of this package on the same data with the same budget, and measures what each gives.

Five contestants: slots that know nothing of each other, O-PTP, C-PTP, gated-LoRA self-distillation, and a single mask
token by the online objective. For each: tokens per step and acceptance per depth in the quadratic layout, at
temperature 0 and 0.7, against plain decoding of the same noise. For the last one also the curve of tau.

    python benchmarks/compare_methods.py --data answers.jsonl --out compare --steps 300 \\
        --prompts spec_bench.jsonl --limit 24 --questions gsm8k_test.jsonl --question-limit 40

Everything is kept in the folder --out: adapters with their checkpoints, `measured.jsonl`, `tau.jsonl`, and at the end
`table.md`, `results.json` and `tau.svg`. The same command goes on after a stop.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from mtp_mlx.blas import prefer_openblas
from mtp_mlx.config import from_yaml, options_for, setting
from mtp_mlx.errors import MTPError
from mtp_mlx.train.settings import TrainSettings

SAMPLED = 0.7  # the temperature besides 0, and the one whose uniforms PTP is trained on
TIMED_STEPS = 3  # of the short run that finds out how long a step takes; the first is not counted


@dataclass(frozen=True)
class Contestant:
    """One trained method.

    Attributes:
        name: of its folder.
        title: of its row.
        settings: of `TrainSettings`, besides what all have in common.
    """

    name: str
    title: str
    settings: dict[str, Any]

    @property
    def noise(self) -> str:
        """How its text is drawn above temperature 0: drafters use the target's noise."""
        return "inverse-cdf" if self.settings["method"] == "ptp" else "gumbel"


# Half of the blocks stand for temperature 0, the other half for the temperature that is measured too.
_PTP = {"method": "ptp", "teacher_temperature": SAMPLED, "greedy_share": 0.5}
CONTESTANTS = (
    Contestant("independent", "independent slots", {**_PTP, "variant": "o", "independent": True}),
    Contestant("o-ptp", "O-PTP", {**_PTP, "variant": "o"}),
    Contestant("c-ptp", "C-PTP", {**_PTP, "variant": "c"}),
    Contestant("self-distil", "gated-LoRA self-distillation", {"method": "mask-tokens"}),
    # Where drafts are emitted unverified, a probability must be one among all tokens.
    Contestant("conf-adapt", "one mask token, online objective", {"method": "conf-adapt", "draft_vocab": 0}),
)
LOSSY = "conf-adapt"  # the contestant whose tau is swept


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Options of the comparison; what training has and this has not is at its default."""

    model: str = setting("smollm2-135m", help="Embedded model, mlx-lm folder or hub id", flag="-m")
    data: Path = setting(help="JSONL that all are trained on", flag="-d")
    out: Path = setting(help="Folder that keeps everything", flag="-o")
    only: tuple[str, ...] = setting((), help="Only these contestants, may be repeated")
    steps: int | None = setting(None, help="Optimizer steps of each", minimum=1)
    seconds: float | None = setting(None, help="Instead of steps: training time of each", minimum=1)
    slots: int = setting(4, help="Drafts of a step", minimum=1)
    rank: int = setting(12, help="Rank of the LoRA", minimum=1)
    draft_vocab: int = setting(8192, help="Ids that may be drafted, 0 for all", minimum=0)
    batch_size: int = setting(2, help="Sequences per micro-batch", minimum=1)
    micro_batches: int = setting(2, help="Micro-batches per step", minimum=1)
    max_length: int = setting(1024, help="Longest sequence in tokens", minimum=8)
    block_share: float = setting(0.5, help="Share of positions that are supervised", minimum=0, maximum=1)
    cut_at_tokens: int = setting(0, help="Answers of this length were cut, 0 for none", minimum=0)
    learning_rate: float = setting(1e-3, help="Peak learning rate", minimum=0)
    warmup: int | None = setting(
        None, help="Steps of rising learning rate, of training's own choice without", minimum=0
    )
    held_out: int = setting(32, help="Held-out rows of training", minimum=0)
    seed: int = setting(0, help="Seed of training and of sampled text", minimum=0)
    prompts: Path | None = setting(None, help="JSONL with prompt (or turns) to decode", flag="-p")
    limit: int | None = setting(None, help="At most this many prompts, spread over the file", minimum=1)
    max_tokens: int = setting(64, help="Tokens per prompt and per question", minimum=2, flag="-n")
    questions: Path | None = setting(None, help="JSONL of the tau sweep: question, answer", flag="-q")
    question_limit: int | None = setting(None, help="At most this many questions", minimum=1)
    tau: tuple[float, ...] = setting(
        (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995), help="Threshold, may be repeated"
    )

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise MTPError("say how long to train: give --steps or --seconds, not both")
        known = [contestant.name for contestant in CONTESTANTS]
        for name in self.only:
            if name not in known:
                raise MTPError(f"unknown contestant '{name}': choose from {', '.join(known)}")

    @property
    def contestants(self) -> list[Contestant]:
        """Those that take part."""
        return [one for one in CONTESTANTS if not self.only or one.name in self.only]


@click.command()
@options_for(CompareSettings)
def main(**options: Any) -> None:
    """Trains and measures; prints the table."""
    settings = from_yaml(CompareSettings, None, options)
    console = Console(stderr=True)
    comparison = Comparison(settings, console)
    try:
        comparison.train()
        comparison.measure()
        comparison.sweep()
    except KeyboardInterrupt:
        console.print("Stopped: the same command goes on from here.")
        sys.exit(130)
    click.echo(comparison.write())


class Comparison:
    """Trains, measures and writes; every part skips what its folder holds already.

    Args:
        settings: see `CompareSettings`.
        console: progress goes there.
    """

    def __init__(self, settings: CompareSettings, console: Console) -> None:
        self.settings, self._console = settings, console
        self._plan = Plan(settings)

    def folder(self, contestant: Contestant) -> Path:
        """Of its adapter."""
        return self.settings.out / contestant.name

    # --- training -------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Every contestant to its last step.

        Raises:
            KeyboardInterrupt: stopped; the state is saved.
        """
        for contestant in self.settings.contestants:
            if self._plan.steps_of(contestant) is None:
                self._plan.keep(contestant, self._steps_in_time(contestant))
            settings = self._plan.training(contestant, self.folder(contestant))
            self._console.rule(f"{contestant.title}, {settings.steps} steps")
            if not self._run(settings):
                raise KeyboardInterrupt

    def _run(self, settings: TrainSettings) -> bool:
        """Whether it got to its last step; what is trained already is only checked to be of these settings.

        Raises:
            MTPError: it was trained, so far or to the end, with other settings, on other data or another model.
        """
        from mtp_mlx.cli.train import ProgressListener, prepare

        with ProgressListener(self._console) as listener:
            trainer = prepare(settings, listener)
            trainer.resume()
            if trained_steps(settings.out) == settings.steps == trainer.step:
                return True
            listener.start(trainer.step, settings.steps)
            return trainer.run()

    def _steps_in_time(self, contestant: Contestant) -> int:
        """Steps that fit into the budget of seconds, by a short run that is thrown away."""
        from mtp_mlx.cli.train import ProgressListener, prepare

        assert self.settings.seconds is not None
        folder = self.settings.out / f"timing-{contestant.name}"
        settings = replace(self._plan.training(contestant, folder, TIMED_STEPS), held_out=0, warmup=0)
        seconds: list[float] = []

        class Timing(ProgressListener):
            def on_step(self, report: Any, total: int) -> None:
                seconds.append(report.seconds)

        with Timing(self._console) as listener:
            if not prepare(settings, listener).run():
                raise KeyboardInterrupt
        shutil.rmtree(folder)
        for file in folder.parent.glob(f"{folder.name}.*"):
            file.unlink()
        return max(int(self.settings.seconds / mean(seconds[1:])), 2)

    # --- decoding -------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Every contestant on every prompt at both temperatures, and plain decoding of the same noise."""
        from mtp_mlx.bench.prompts import read_prompts

        settings = self.settings
        prompts = [prompt.text for prompt in read_prompts(settings.prompts, settings.limit, None)]
        kept = Kept(settings.out / "measured.jsonl", self._plan.key(prompts))
        contestants = settings.contestants
        noises = sorted({one.noise for one in contestants})
        runs = [Run("plain", None, 0.0, "gumbel"), *(Run("plain", None, SAMPLED, noise) for noise in noises)]
        runs += [Run(one.name, self.folder(one), t, one.noise) for one in contestants for t in (0.0, SAMPLED)]
        with Progress(console=self._console) as progress:
            task = progress.add_task("decoding", total=len(runs) * len(prompts))
            for run in runs:
                progress.update(task, description=f"{run.name} at {run.temperature:g}")
                decoder: Decoder | None = None
                for index, prompt in enumerate(prompts):
                    if kept.get(run.name, run.temperature, run.noise, index) is None:
                        decoder = decoder or Decoder(settings, run)
                        kept.add(decoder(prompt, index))
                    progress.advance(task)
        self._rows, self._prompts = kept.rows, len(prompts)

    def sweep(self) -> None:
        """ConfAdapt tau by tau."""
        from mtp_mlx.cli.eval import EvalSettings, sweep

        self._tau_rows: list[Any] = []
        contestant = next((one for one in self.settings.contestants if one.name == LOSSY), None)
        if contestant is None:
            return
        settings = EvalSettings(
            model=self.settings.model,
            adapter=str(self.folder(contestant)),
            questions=self.settings.questions,
            limit=self.settings.question_limit,
            tau=self.settings.tau,
            max_tokens=self.settings.max_tokens,
            out=self.settings.out / "tau.jsonl",
        )
        self._tau_rows, whole = sweep(settings, False, self._console)
        if not whole:
            raise KeyboardInterrupt

    # --- what comes of it -----------------------------------------------------------------------------------

    def write(self) -> str:
        """Writes `table.md`, `results.json` and `tau.svg`; the table's text."""
        from mtp_mlx.eval.plot import svg
        from mtp_mlx.files import write_text

        out = self.settings.out
        results = [self._result(contestant) for contestant in self.settings.contestants]
        content = {"settings": self._plan.to_json(), "results": results}
        content["tau"] = [row.to_json() for row in self._tau_rows]
        write_text(out / "results.json", json.dumps(content, indent=2) + "\n")
        text = "\n".join([*method_table(results), "", *tau_table(self._tau_rows)])
        write_text(out / "table.md", text)
        if self._tau_rows:
            write_text(out / "tau.svg", svg(self._tau_rows, f"ConfAdapt, {self.settings.model}"))
        return text

    def _result(self, contestant: Contestant) -> dict[str, Any]:
        """Training and decoding of one contestant, as plain values."""
        settings = self._plan.training(contestant, self.folder(contestant))
        out: dict[str, Any] = {
            "name": contestant.name,
            "title": contestant.title,
            "steps": settings.steps,
            "seconds": round(seconds_of(settings.out), 1),
            "held_out": recorded_acceptance(settings.out),
        }
        for temperature in (0.0, SAMPLED):
            own = [r for r in self._rows if (r.name, r.temperature) == (contestant.name, temperature)]
            plain = {
                r.prompt: r.tokens
                for r in self._rows
                if r.name == "plain"
                and r.temperature == temperature
                and (not temperature or r.noise == contestant.noise)
            }
            out[f"at {temperature:g}"] = {
                "tokens_per_step": round(sum(r.counted for r in own) / sum(r.steps for r in own), 4),
                "rows_per_step": round(sum(r.rows for r in own) / sum(r.steps for r in own), 3),
                "acceptance": acceptance(own),
                "same_text": sum(r.tokens == plain[r.prompt] for r in own),
                "prompts": len(own),
                "lossless": True,
            }
        return out


NOT_MEASURED = (
    "only",
    "steps_of",
    "questions",
    "question_limit",
    "tau",
)  # settings that decoding does not read


class Plan:
    """How long each contestant trains; written down once, so that a stopped run goes on with the same."""

    def __init__(self, settings: CompareSettings) -> None:
        self._settings, self._path = settings, settings.out / "plan.json"
        self._steps: dict[str, int] = {}
        if self._path.exists():
            plan = json.loads(self._path.read_text(encoding="utf-8"))
            if plan["seconds"] != settings.seconds:
                raise MTPError(
                    f"{self._path} was made for --seconds {plan['seconds']:g}: say so again, or give another --out"
                )
            self._steps = plan["steps"]

    def steps_of(self, contestant: Contestant) -> int | None:
        """None while it is not known how many fit into the time."""
        return self._settings.steps or self._steps.get(contestant.name)

    def keep(self, contestant: Contestant, steps: int) -> None:
        """Writes down how many."""
        from mtp_mlx.files import write_text

        self._steps[contestant.name] = steps
        plan = {"seconds": self._settings.seconds, "steps": self._steps}
        write_text(self._path, json.dumps(plan) + "\n")

    def training(self, contestant: Contestant, out: Path, steps: int | None = None) -> TrainSettings:
        """The settings of its training."""
        own = self._settings
        total = steps or self.steps_of(contestant)
        assert total is not None
        common: dict[str, Any] = {
            name: getattr(own, name)
            for name in (
                "model", "data", "slots", "rank", "draft_vocab", "batch_size", "micro_batches", "max_length",
                "cut_at_tokens", "learning_rate", "warmup", "held_out", "seed",
            )
        }  # fmt: skip
        if contestant.name != LOSSY:  # regions have their own way to choose positions
            common["block_share"] = own.block_share
        return TrainSettings(
            **common | contestant.settings,
            out=out,
            alpha=2.0 * own.rank,
            steps=total,
            schedule="linear",
            measure_every=0,
        )

    def key(self, prompts: Sequence[str]) -> str:
        """Of everything that a measurement depends on."""
        import hashlib

        values = {k: v for k, v in self.to_json().items() if k not in NOT_MEASURED}
        return hashlib.sha256(json.dumps([values, list(prompts)], sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain values; files by name, since folders are a machine's business."""
        values = {
            k: v.name if isinstance(v, Path) else v for k, v in asdict(self._settings).items() if k != "out"
        }
        return {**values, "model": Path(self._settings.model).name, "steps_of": dict(self._steps)}


@dataclass(frozen=True)
class Run:
    """A way of decoding: with an adapter, or plainly without one."""

    name: str
    adapter: Path | None
    temperature: float
    noise: str


@dataclass(frozen=True)
class Decoded:
    """One prompt decoded.

    Attributes:
        tokens: written, the end token included.
        counted: tokens of all steps; the last step may have given more than was used.
        steps, rows: forward passes after the prompt, and their rows.
        submitted, accepted: drafts per depth, as `DecodeStats`.
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
    """Decodes prompts by one `Run`."""

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
    """Measurements in a JSONL file.

    Raises:
        MTPError: the file belongs to another comparison.
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
                raise MTPError(f"{self._path} holds measurements of other settings: give another --out")
            yield Decoded(**row)

    def get(self, *which: Any) -> Decoded | None:
        """The row of (name, temperature, noise, prompt), if it is there."""
        return next((r for r in self.rows if (r.name, r.temperature, r.noise, r.prompt) == which), None)

    def add(self, row: Decoded) -> None:
        """Keeps it at once."""
        self.rows.append(row)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": self._key, **asdict(row)}) + "\n")


# --- tables ---------------------------------------------------------------------------------------------------


def acceptance(rows: Sequence[Decoded]) -> list[float | None]:
    """Per depth: P(accepted | reached) over all rows."""
    depths = max((len(row.submitted) for row in rows), default=0)

    def total(pick: Callable[[Decoded], list[int]], depth: int) -> int:
        return sum(pick(row)[depth] for row in rows if len(pick(row)) > depth)

    out: list[float | None] = []
    for depth in range(depths):
        reached = total(lambda row: row.submitted, depth)
        out.append(round(total(lambda row: row.accepted, depth) / reached, 4) if reached else None)
    return out


def trained_steps(folder: Path) -> int | None:
    """Steps of a finished training; None without one."""
    config = folder / "mtp_config.json"
    return json.loads(config.read_text(encoding="utf-8"))["training"]["steps"] if config.exists() else None


def recorded_acceptance(folder: Path) -> list[float]:
    """Acceptance per depth on held-out rows, teacher-forced, as training measured it last."""
    config = json.loads((folder / "mtp_config.json").read_text(encoding="utf-8"))
    return [round(value, 4) for value in config["acceptance"]]


def seconds_of(folder: Path) -> float:
    """Time of all steps of a training."""
    metrics = folder.with_name(folder.name + ".metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(sum(json.loads(line).get("seconds", 0.0) for line in metrics))


def method_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    columns = ["method", "steps", "training s"]
    for temperature in (0.0, SAMPLED):
        columns += [f"tok/step at {temperature:g}", "acceptance per depth", "same text"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for result in results:
        cells = [result["title"], str(result["steps"]), f"{result['seconds']:.0f}"]
        for temperature in (0.0, SAMPLED):
            own = result[f"at {temperature:g}"]
            depths = " / ".join("-" if value is None else f"{value:.2f}" for value in own["acceptance"])
            cells += [f"{own['tokens_per_step']:.2f}", depths, f"{own['same_text']}/{own['prompts']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def tau_table(rows: Sequence[Any]) -> list[str]:
    """Lines of Markdown; nothing without a sweep."""
    if not rows:
        return []
    columns = ("tau", "questions", "tok/pass", "agreement", "nll/token", "same text", "right", "lossless")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (
            "plain" if row.tau is None else f"{row.tau:g}",
            str(row.questions),
            f"{row.tokens_per_pass:.2f}",
            f"{100 * row.agreement:.1f} %",
            f"{row.nll:.3f}",
            f"{100 * row.same:.0f} %",
            "-" if row.right is None else f"{100 * row.right:.1f} %",
            str(row.lossless).lower(),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    prefer_openblas()
    try:
        main()
    except MTPError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
