"""`mtp-mlx doctor`: show versions, the device, and which implementation of every kernel is used and why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mtp_mlx.metal_kernels.dispatch import Dispatcher
    from mtp_mlx.metal_kernels.verdicts import Verdict

EPILOG = """\b
Examples:
  mtp-mlx doctor
  mtp-mlx doctor --kernels --json
  MTP_MLX_KERNELS=off mtp-mlx doctor
"""


@click.command(epilog=EPILOG, short_help="Show versions, device and kernels, for bug reports")
@click.option("--kernels", "check", is_flag=True, help="Check and race every kernel now")
@click.option("--forget", is_flag=True, help="Forget recorded verdicts, so that all shapes are raced again")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object")
def command(check: bool, forget: bool, as_json: bool) -> None:
    """Show versions, the device, and whether each Metal kernel is used and why."""
    report = examine(check, forget)
    click.echo(json.dumps(report) if as_json else "\n".join(lines(report)))


def examine(check: bool, forget: bool = False) -> dict[str, Any]:
    """The report: verdicts on the shapes met so far and, with `check`, new ones on sample calls (raced in mode auto).

    Raises:
        MTPError: if MTP_MLX_KERNELS is invalid, or asks for something this machine cannot do.
    """
    from mtp_mlx.cli.info import machine
    from mtp_mlx.files import cache_dir
    from mtp_mlx.metal_kernels.dispatch import KERNELS, default_dispatcher

    dispatcher = default_dispatcher(cache_dir)
    if forget:
        dispatcher.verdicts.forget()
    return {
        "machine": machine(),
        "kernel_mode": dispatcher.mode,
        "kernel_factory": dispatcher.factory_name,
        "kernels": {name: _kernel(dispatcher, name, check) for name in KERNELS},
    }


def _kernel(dispatcher: Dispatcher, name: str, check: bool) -> dict[str, Any]:
    """Lane and reason of one kernel, its verdicts by shape, and, with `check`, new verdicts on its samples."""
    if not dispatcher.active:
        return {"lane": "reference", "reason": dispatcher.factory_name, "shapes": {}, "samples": {}}
    start = f"{name} "
    met = {
        key.removeprefix(start): verdict
        for key, verdict in dispatcher.verdicts.items()
        if key.startswith(start)
    }
    samples = dispatcher.judge_samples(name, raced=dispatcher.mode == "auto") if check else {}
    shown = {"shapes": met, "samples": samples}
    return {
        **_lane(met, samples),
        **{what: {key: _verdict(verdict) for key, verdict in found.items()} for what, found in shown.items()},
    }


def _lane(verdicts: dict[str, Verdict], samples: dict[str, Verdict]) -> dict[str, str]:
    """Lane and reason, from the shapes that generations met; a failed sample takes precedence."""
    failed = [
        verdict.reason for verdict in samples.values() if not verdict.uses_kernel and not verdict.time_ratio
    ]
    if failed:
        return {"lane": "reference", "reason": failed[0]}
    if not verdicts:
        checked = "its samples pass" if samples else "check its samples with --kernels"
        return {"lane": "undecided", "reason": f"no generation has used it yet; {checked}"}
    used = sum(verdict.uses_kernel for verdict in verdicts.values())
    reasons = sorted({verdict.reason for verdict in verdicts.values()})
    lane = "kernel" if used == len(verdicts) else "reference" if not used else "kernel for some shapes"
    return {"lane": lane, "reason": "; ".join(reasons)}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    shown: dict[str, Any] = {"kernel": verdict.uses_kernel, "reason": verdict.reason}
    if verdict.time_ratio is not None:
        shown["time_over_reference"] = verdict.time_ratio
    return shown


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    from mtp_mlx.cli.info import lines as info_lines

    shown = info_lines(report["machine"])
    shown += ["", f"kernels ({report['kernel_factory']}, MTP_MLX_KERNELS={report['kernel_mode']})"]
    for name, kernel in report["kernels"].items():
        shown.append(f"  {name:<16} {kernel['lane']}: {kernel['reason']}")
        for what in ("shapes", "samples"):
            for shape, verdict in kernel[what].items():
                ratio = verdict.get("time_over_reference")
                timed = "" if ratio is None else f", {ratio:.2f} of MLX's time"
                lane = "kernel" if verdict["kernel"] else "reference"
                shown.append(f"    {what[:-1]} {shape:<34} {lane}: {verdict['reason']}{timed}")
    return shown
