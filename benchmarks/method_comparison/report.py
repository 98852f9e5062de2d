"""The table, the numbers and the plot of the comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from method_comparison.contestants import SAMPLED, Contestant
from method_comparison.decoding import Decoded
from method_comparison.plan import Plan
from method_comparison.tau import tau_table


def write(plan: Plan, measured: Sequence[Decoded], tau_rows: Sequence[Any]) -> str:
    """Write `table.md`, `results.json` and `tau.svg`; returns the table."""
    from mtp_mlx.files import write_text
    from mtp_mlx.measure.tau_plot import svg

    out = plan.settings.out
    results = [_result(plan, contestant, measured) for contestant in plan.settings.contestants]
    content = {"settings": plan.to_json(), "results": results}
    content["tau"] = [row.to_json() for row in tau_rows]
    write_text(out / "results.json", json.dumps(content, indent=2) + "\n")
    text = "\n".join([*method_table(results), "", *tau_table(tau_rows)])
    write_text(out / "table.md", text)
    if tau_rows:
        write_text(out / "tau.svg", svg(tau_rows, f"ConfAdapt, {plan.settings.model}"))
    return text


def _result(plan: Plan, contestant: Contestant, measured: Sequence[Decoded]) -> dict[str, Any]:
    """The training and decoding results of one contestant, as plain values."""
    settings = plan.training(contestant, plan.settings.folder(contestant))
    out: dict[str, Any] = {
        "name": contestant.name,
        "title": contestant.title,
        "steps": settings.steps,
        "seconds": round(seconds_of(settings.out), 1),
        "held_out": recorded_acceptance(settings.out),
    }
    for temperature in (0.0, SAMPLED):
        own = [r for r in measured if (r.name, r.temperature) == (contestant.name, temperature)]
        plain = {
            r.prompt: r.tokens
            for r in measured
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


def acceptance(rows: Sequence[Decoded]) -> list[float | None]:
    """Acceptance by depth over all rows: P(accepted | reached)."""
    depths = max((len(row.submitted) for row in rows), default=0)

    def total(pick: Callable[[Decoded], list[int]], depth: int) -> int:
        return sum(pick(row)[depth] for row in rows if len(pick(row)) > depth)

    out: list[float | None] = []
    for depth in range(depths):
        reached = total(lambda row: row.submitted, depth)
        out.append(round(total(lambda row: row.accepted, depth) / reached, 4) if reached else None)
    return out


def recorded_acceptance(folder: Path) -> list[float]:
    """The acceptance by depth that training last measured on held-out rows, teacher-forced."""
    config = json.loads((folder / "mtp_config.json").read_text(encoding="utf-8"))
    return [round(value, 4) for value in config["acceptance"]]


def seconds_of(folder: Path) -> float:
    """The total seconds of all training steps."""
    metrics = folder.with_name(folder.name + ".metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(sum(json.loads(line).get("seconds", 0.0) for line in metrics))


def method_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """The table as lines of Markdown."""
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
