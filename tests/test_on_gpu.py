"""benchmarks/on_gpu.sh runs, in tiny form, on this machine: every stage, and those behind one that fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import on_gpu
import pytest
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("timeout")), reason="a script for Linux"
)


def run(folder: Path, python: str, **variables: str) -> subprocess.CompletedProcess[str]:
    given = {"ON_GPU_TINY": "1", "OUT": str(folder / "out"), "PYTHON": python, **variables}
    return subprocess.run(
        ["bash", str(SCRIPT)], env={**os.environ, **given}, capture_output=True, text=True, timeout=600
    )


def bundle(folder: Path) -> str:
    """A bundle in two pieces; it takes the package along, so what runs is a copy in the folder `site`."""
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "carried.txt").write_text("here")
    subprocess.run("tar -C . -c site | xz | split -b 100 - bundle.part-", shell=True, check=True, cwd=folder)
    assert len(list(folder.glob("bundle.part-*"))) > 1
    return str(folder)


def test_every_stage(tmp_path: Path) -> None:
    result = run(tmp_path, sys.executable, BUNDLE=bundle(tmp_path / "bundle"))
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    names = ["unpack", "device", "tests", "mask-tokens", "mtp-heads", "measure", "results"]
    assert list(summary["stages"]) == names and not any(one["code"] for one in summary["stages"].values())
    site = tmp_path / "out.work" / "site"
    assert (site / "carried.txt").read_text() == "here" and (site / "mtp_mlx" / "metal_kernels").is_dir()
    for name in ("mask-tokens", "mtp-heads"):
        assert summary[name]["training"]["steps"] == 2
        assert [row["lane"] for row in summary[name]["bench"]] == ["auto", "linear"]
        with safe_open(tmp_path / "out" / name / "mtp.safetensors", "np") as tensors:
            assert len(tensors.keys()) > 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8 and max(path.stat().st_size for path in files) < 16 * 2**20


def test_stages_go_on_behind_one_that_fails(tmp_path: Path) -> None:
    result = run(tmp_path, "false")
    assert result.returncode == 1 + 2 + 4 + 8 + 16 + 32
    assert (tmp_path / "out.work" / "stages.txt").read_text().count(" 1 ") == 6
    assert (tmp_path / "out" / "log.txt").is_file()


def test_large_tensors_come_back_in_parts(tmp_path: Path) -> None:
    adapter = tmp_path / "out.work" / "mtp-heads"
    adapter.mkdir(parents=True)
    (adapter / "mtp_config.json").write_text("{}")
    (adapter / "mtp.safetensors").write_bytes(bytes(20 * 2**20))
    run(tmp_path, "false")
    parts = sorted((tmp_path / "out" / "mtp-heads").glob("mtp.safetensors.part-*"))
    assert [part.stat().st_size for part in parts] == [15 * 2**20, 5 * 2**20]


def test_steps_fit_the_time(tmp_path: Path) -> None:
    """The first steps of the probe are slower; acceptance has lines of its own."""
    seconds = [9.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.4, 3.0, 0.5]
    rows = [{"step": n, "loss": 1.0, "seconds": value} for n, value in enumerate(seconds)]
    path = tmp_path / "probe.metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 9, "acceptance": [0.1]}]))
    assert on_gpu.steps(path, 100.0) == 180
    assert on_gpu.steps(path, -5.0) == on_gpu.FEWEST
    assert on_gpu.steps(path, 1e9) == on_gpu.MOST


def test_a_missing_gpu_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx.core.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        on_gpu.main(["check"])
    on_gpu.main(["check", "--cpu"])
    assert json.loads(capsys.readouterr().out)["gpu"] is False
