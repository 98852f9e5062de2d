"""The parts of benchmarks/on_gpu.sh that are easier in Python: device check, number of steps, summary.

python benchmarks/on_gpu.py libraries                     folders of NVIDIA's Python packages, for LD_LIBRARY_PATH
python benchmarks/on_gpu.py check [--cpu]                 fails if MLX has no GPU or multiplies wrongly
python benchmarks/on_gpu.py steps METRICS SECONDS         training steps that fit the time, by a probe's metrics
python benchmarks/on_gpu.py summary WORK                  one JSON object about a run
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

FIRST = 4  # steps of a probe that compile kernels and fill caches
FEWEST, MOST = 20, 20_000  # steps of a run
HEADROOM = 0.9  # of the time: a step can take longer than in the probe


def libraries() -> str:
    """Folders with shared libraries of the packages nvidia-*, joined by colons."""
    return ":".join(str(path) for root in sys.path for path in sorted(Path(root).glob("nvidia/*/lib")))


def check(cpu: bool) -> dict[str, Any]:
    """What MLX computes on, whether a product is right, and TFLOP/s of a product in bfloat16.

    Raises:
        SystemExit: there is no GPU, or the product is wrong.
    """
    import mlx.core as mx
    import numpy as np

    on_gpu = bool(mx.cuda.is_available())
    if not (on_gpu or cpu):
        raise SystemExit("MLX finds no NVIDIA GPU")
    left = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    wrong = float(np.abs(np.array(mx.array(left) @ mx.array(left)) - left @ left).max())
    if wrong > 0.5:  # some GPUs round factors to 10 bits
        raise SystemExit(f"a product of matrices is off by {wrong}")
    size = 8192 if on_gpu else 256
    factor = mx.random.normal((size, size)).astype(mx.bfloat16)
    mx.eval(factor @ factor)
    started = time.perf_counter()
    for _ in range(10):
        mx.eval(factor @ factor)
    tflops = 10 * 2 * size**3 / (time.perf_counter() - started) / 1e12
    return {
        "gpu": on_gpu,
        "device": str(mx.default_device()),
        "mlx": mx.__version__,
        "tflops": round(tflops, 1),
    }


def steps(metrics: Path, seconds: float) -> int:
    """Steps that fit `seconds`, by the median of a probe's steps."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    times = [row["seconds"] for row in rows if "seconds" in row]
    step = statistics.median(times[FIRST:] or times)
    return min(MOST, max(FEWEST, int(HEADROOM * seconds / step)))


def summary(work: Path) -> dict[str, Any]:
    """Stages, device, trainings and measured speeds, as far as there are any."""
    stages = {}
    for line in (work / "stages.txt").read_text(encoding="utf-8").splitlines():
        name, code, seconds = line.split()
        stages[name] = {"code": int(code), "seconds": int(seconds)}
    found: dict[str, Any] = {"stages": stages, "device": _read(work / "check.json")}
    for name in ("mask-tokens", "mtp-heads"):
        trained, benched = _read(work / f"{name}.json"), _read(work / f"{name}.bench.json")
        rows = (benched or {}).get("rows", [])
        found[name] = {"training": trained, "bench": [row for row in rows if row["category"] == "all"]}
    return found


def _read(path: Path) -> Any:
    """The JSON of a file; None if it is missing or was not finished."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("libraries")
    commands.add_parser("check").add_argument("--cpu", action="store_true", help="a CPU will do")
    probe = commands.add_parser("steps")
    probe.add_argument("metrics", type=Path)
    probe.add_argument("seconds", type=float)
    commands.add_parser("summary").add_argument("work", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "libraries":
        print(libraries())
    elif given.command == "check":
        print(json.dumps(check(given.cpu)))
    elif given.command == "steps":
        print(steps(given.metrics, given.seconds))
    else:
        print(json.dumps(summary(given.work)))


if __name__ == "__main__":
    main()
