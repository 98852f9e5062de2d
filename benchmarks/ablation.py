"""Train several recipes on one budget, and measure them: the ablation tables of docs/training.md.

    python benchmarks/ablation.py benchmarks/ablations/slots.yaml --data train.jsonl --answers dev.jsonl --out runs

The YAML file names a training method, the settings that all cases share, and for every case those it changes:

    method: mask-tokens
    budget: 40000                 supervised rows of a run, the same for all within 5 %
    shared: {draft_vocab: 16384}
    cases:
      today: {}
      latent matching: {lcm_weight: 1.0}
    seeds: {latent matching: [0, 1]}

Runs are resumed, and finished ones kept: the same command goes on where it was stopped. ANSWERS are greedy answers of
the base model (`mtp-mlx distill`) on which acceptance is measured, teacher-forced.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml

MEASURES = {"mask-tokens": "slots_acceptance.py", "mtp-heads": "heads_acceptance.py"}
FOLDER_OPTIONS = {"slots_acceptance.py": "--adapter", "heads_acceptance.py": "--heads"}
PROBE_STEPS = 8  # how many rows a step of a case has is first guessed by training that many
TOLERANCE = 0.05  # how far from the budget the rows of a run may be
ATTEMPTS = 4


@dataclass(frozen=True)
class Plan:
    """What a YAML file says.

    Attributes:
        method: training method.
        budget: supervised rows of a run.
        shared: settings of all cases.
        cases: {name: settings that differ}.
        seeds: {name: seeds}, by default [0].
    """

    method: str
    budget: int
    shared: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    seeds: dict[str, list[int]] = field(default_factory=dict)

    def runs(self) -> list[tuple[str, int, dict[str, Any]]]:
        """(case, seed, settings) of every run."""
        return [
            (name, seed, {**self.shared, **own, "seed": seed})
            for name, own in self.cases.items()
            for seed in self.seeds.get(name, [0])
        ]


def read(path: Path) -> Plan:
    """The plan in a YAML file.

    Raises:
        click.UsageError: it is none.
    """
    try:
        return Plan(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise click.UsageError(f"{path}: not a plan of an ablation ({error})") from error


def train(method: str, settings: dict[str, Any], data: Path, out: Path) -> None:
    """Runs `mtp-mlx train`, or what is left of it; its own words go to stderr.

    Raises:
        click.ClickException: it failed, was interrupted, or `out` is of a run with other settings.
    """
    config = out.with_name(out.name + ".yaml")
    content = yaml.safe_dump({**settings, "data": str(data), "out": str(out)})
    if config.exists() and config.read_text(encoding="utf-8") != content:
        raise click.ClickException(
            f"{config} is of a run with other settings: give another --out, or remove it"
        )
    config.write_text(content, encoding="utf-8")
    if finished(out):
        return
    program = str(Path(sys.executable).with_name("mtp-mlx"))
    command = [program, "train", method, "--config", str(config)]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise click.ClickException(f"{' '.join(command)} failed")


def finished(out: Path) -> bool:
    """Whether an adapter folder is that of a whole run: one that was stopped is written too."""
    try:
        training = json.loads((out / "mtp_config.json").read_text(encoding="utf-8"))["training"]
    except OSError:
        return False
    return bool(training["steps"] == training["planned_steps"])


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The steps in the metrics of a run."""
    path = out.with_name(out.name + ".metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "rows" in row]


def rows_of(out: Path) -> int:
    """Supervised rows that a run has learned from."""
    return sum(row["rows"] for row in steps_of(out))


def run(plan: Plan, name: str, seed: int, settings: dict[str, Any], data: Path, folder: Path) -> Path:
    """Trains a case on its budget, unless it has been; returns its adapter folder.

    Steps have very different numbers of rows. So a run that missed the budget is made again, with as many steps as
    its own rows per step call for.
    """
    stem = f"{name.replace(' ', '-')}-{seed}"
    held = {"held_out": 0, "measure_every": 0}
    out = folder / f"{stem}.probe"
    if not (out / "mtp_config.json").exists() and not (folder / stem / "mtp_config.json").exists():
        train(plan.method, {**settings, **held, "warmup": 0, "steps": PROBE_STEPS}, data, out)
    for attempt in (stem, *(f"{stem}.{number}" for number in range(2, ATTEMPTS + 1))):
        before, out = out, folder / attempt
        if not (out / "mtp_config.json").exists():
            steps = max(2, round(plan.budget * len(steps_of(before)) / rows_of(before)))
            click.echo(f"{attempt}: {steps} steps", err=True)
            train(plan.method, {**settings, **held, "steps": steps}, data, out)
        if abs(rows_of(out) / plan.budget - 1) <= TOLERANCE:
            return out
    raise click.ClickException(f"{name}: {ATTEMPTS} runs missed the budget by more than {TOLERANCE:.0%}")


def measured(plan: Plan, folders: list[Path], answers: Path, limit: int | None) -> list[dict[str, Any]]:
    """What the method's acceptance benchmark finds for every folder."""
    script = MEASURES[plan.method]
    command = [sys.executable, str(Path(__file__).with_name(script)), "--data", str(answers), "--json"]
    command += [word for folder in folders for word in (FOLDER_OPTIONS[script], str(folder))]
    if limit is not None:
        command += ["--limit", str(limit)]
    if "hidden_cache" in plan.shared:
        command += ["--hidden-cache", plan.shared["hidden_cache"]]
    return list(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


@click.command()
@click.argument("plan_file", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Training rows")
@click.option(
    "--answers", type=click.Path(path_type=Path), required=True, help="Greedy answers to measure on"
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the runs")
@click.option("--limit", type=int, help="Measure on this many answers only")
@click.option("--train-only", is_flag=True, help="Train all cases, measure none")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table")
def main(
    plan_file: Path, data: Path, answers: Path, out: Path, limit: int | None, train_only: bool, as_json: bool
) -> None:
    """Train the cases of PLAN_FILE and print a table of their acceptance."""
    plan = read(plan_file)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if plan.method == "mtp-heads":  # the base's states are the same for all cases
        plan.shared["hidden_cache"] = str(out / "states")
    runs = plan.runs()
    folders = [run(plan, *one, data, out) for one in runs]
    click.echo(f"{len(runs)} runs after {time.monotonic() - started:.0f} s", err=True)
    if train_only:
        return
    results = measured(plan, folders, answers, limit)
    table = []
    for (name, seed, _), folder, result in zip(runs, folders, results, strict=True):
        steps = steps_of(folder)
        table.append(
            {
                "case": name,
                "seed": seed,
                "steps": len(steps),
                "rows": rows_of(folder),
                "seconds": sum(row["seconds"] for row in steps),
                "acceptance": result["ar"],
                "tokens_per_step": result["tokens_per_step"],
            }
        )
    if as_json:
        click.echo(json.dumps(table))
        return
    click.echo(
        "| recipe | seed | steps | rows | accepted by depth | tokens per step |\n|---|---|---|---|---|---|"
    )
    for row in table:
        depths = " / ".join(f"{value:.3f}" for value in row["acceptance"])
        click.echo(
            f"| {row['case']} | {row['seed']} | {row['steps']} | {row['rows']:,} | {depths} | "
            f"{row['tokens_per_step']:.3f} |"
        )


if __name__ == "__main__":
    main()
