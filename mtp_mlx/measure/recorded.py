"""Where measured acceptance comes from: an adapter's record, or the JSON of `mtp-mlx bench` and `mtp-mlx eval`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_mlx.adapter_folder import CONFIG_NAME, read_config
from mtp_mlx.errors import MTPError

HEADS = "mtp-heads"


@dataclass(frozen=True)
class MeasuredAcceptance:
    """P(accepted | reached) by depth.

    Attributes:
        name: category, or "all".
        acceptance: [depths], each in [0, 1].
        heads: measured with MTP heads, else with mask slots.
        source: where it was read.
    """

    name: str
    acceptance: tuple[float, ...]
    heads: bool
    source: str


def from_adapter(folder: Path) -> MeasuredAcceptance:
    """What an adapter folder records about itself.

    Raises:
        MTPError: no adapter there, or it records no acceptance.
    """
    config = read_config(folder)
    found = _depths(config.get("acceptance"))
    if not found:
        raise MTPError(
            f"{folder / CONFIG_NAME} records no acceptance: measure it with `mtp-mlx bench --json` and give that "
            "file with --bench"
        )
    return MeasuredAcceptance("all", found, config.get("method") == HEADS, str(folder))


def from_report(path: Path, lane: str | None = None) -> list[MeasuredAcceptance]:
    """What one lane of a bench or eval report measured, by category.

    Args:
        lane: its name; by default the first one of a fixed layout, since in "auto" easier texts get more drafts,
            else the first that measured any acceptance.

    Raises:
        MTPError: no such report, an unknown lane, or a lane in which nothing was drafted.
    """
    rows, heads = _read_rows(path)
    lanes = list(dict.fromkeys(str(row["lane"]) for row in rows if _depths(row.get("acceptance"))))
    if not lanes:
        raise MTPError(f"{path} holds no acceptance: nothing was drafted in it; measure with an adapter")
    if lane is not None and lane not in lanes:
        raise MTPError(f"{path} has no lane '{lane}' with acceptance: there is {', '.join(lanes)}")
    fixed = [name for name in lanes if not name.startswith("auto")]
    chosen = lane or (fixed or lanes)[0]
    source = f"{path}, lane {chosen}"
    return [
        MeasuredAcceptance(str(row.get("category", "all")), depths, heads, source)
        for row in rows
        if row["lane"] == chosen and (depths := _depths(row.get("acceptance")))
    ]


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], bool]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MTPError(f"{path} does not exist: write it with `mtp-mlx bench --json > {path}`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise MTPError(f"{path} cannot be read as JSON: {error}") from error
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "lane" in row for row in rows):
        raise MTPError(f"{path} is no report of `mtp-mlx bench --json` or `mtp-mlx eval --json`")
    return rows, report.get("method") == HEADS


def _depths(values: Any) -> tuple[float, ...]:
    """The leading depths that were reached."""
    found: list[float] = []
    for value in values if isinstance(values, list) else []:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            break
        found.append(float(value))
    return tuple(found)
