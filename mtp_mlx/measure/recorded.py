"""Measured acceptance: what an adapter records, or what `mtp-mlx bench --json` and `mtp-mlx eval --json` report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_mlx.adapter_folder import CONFIG_NAME, read_header
from mtp_mlx.decode.drafter import source_of
from mtp_mlx.drafters import registry
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel


@dataclass(frozen=True)
class MeasuredAcceptance:
    """P(accepted | reached) by depth.

    Attributes:
        name: category, or "all".
        acceptance: [depths], each in [0, 1].
        chained: the drafts were made behind the pass; otherwise by slot rows, which cost a pass more.
        linear_only: slots can stand behind the last draft only.
        source: where it was read.
    """

    name: str
    acceptance: tuple[float, ...]
    chained: bool
    source: str
    linear_only: bool = False


def from_adapter(folder: Path) -> MeasuredAcceptance:
    """The acceptance that an adapter folder records.

    Raises:
        MTPError: no adapter there, or no acceptance recorded.
    """
    header = read_header(folder)
    found = _depths(header.acceptance)
    if not found:
        raise MTPError(
            f"{folder / CONFIG_NAME} records no acceptance: measure it with `mtp-mlx bench --json` and give that "
            "file as `bench`"
        )
    chained = registry.is_chained(header.method)
    return MeasuredAcceptance("all", found, chained, str(folder), header.base_recurrent)


def from_report(path: Path, lane: str | None = None) -> list[MeasuredAcceptance]:
    """The acceptance of one lane of a bench or eval report, by category.

    Args:
        path: the JSON file.
        lane: its name; by default the first one with a fixed layout (in "auto", easy texts get more drafts), else the
            first one with any acceptance.

    Raises:
        MTPError: not a report, an unknown lane, or no drafts in any lane.
    """
    report = _read_report(path)
    rows = report["rows"]
    lanes = list(dict.fromkeys(str(row["lane"]) for row in rows if _depths(row.get("acceptance"))))
    if not lanes:
        raise MTPError(f"{path} holds no acceptance: nothing was drafted in it; measure with an adapter")
    if lane is not None and lane not in lanes:
        raise MTPError(f"{path} has no lane '{lane}' with acceptance: there is {', '.join(lanes)}")
    fixed = [name for name in lanes if not name.startswith("auto")]
    chosen = lane or (fixed or lanes)[0]
    chained, source = _is_chained(report), f"{path}, lane {chosen}"
    linear_only = report.get("linear_only") is True
    return [
        MeasuredAcceptance(str(row.get("category", "all")), depths, chained, source, linear_only)
        for row in rows
        if row["lane"] == chosen and (depths := _depths(row.get("acceptance")))
    ]


def drafted_with(model: AttachedModel) -> dict[str, str | bool | None]:
    """What a report says of the model's own drafter: `method` of its adapter, and where it places slots."""
    source = source_of(model)
    return {
        "method": None if model.info is None else str(model.info.to_json()["method"]),
        "places_slots": None if source is None else source.places_slots,
        "linear_only": bool(model.why_linear),
    }


def _is_chained(report: dict[str, Any]) -> bool:
    """As the report says (null: only the text drafted, which needs no slots); older ones name the method alone."""
    if "places_slots" in report:
        return report["places_slots"] is not True
    return registry.is_chained(report.get("method"))


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MTPError(f"{path} does not exist: write it with `mtp-mlx bench --json > {path}`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise MTPError(f"{path} cannot be read as JSON: {error}") from error
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "lane" in row for row in rows):
        raise MTPError(f"{path} is no report of `mtp-mlx bench --json` or `mtp-mlx eval --json`")
    return report


def _depths(values: Any) -> tuple[float, ...]:
    """The leading depths that were reached."""
    found: list[float] = []
    for value in values if isinstance(values, list) else []:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            break
        found.append(float(value))
    return tuple(found)
