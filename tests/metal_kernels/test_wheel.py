"""Proves that a built wheel carries all that the package reads, and that the command and every kernel run from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest

from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]

LAUNCH_ALL = """
import sys
from pathlib import Path
import mtp_mlx
from mtp_mlx.metal_kernels import dispatch
assert Path(mtp_mlx.__file__).is_relative_to(sys.argv[1]), mtp_mlx.__file__
texts = []
def factory(**text):
    def call(**arguments):
        texts.append(text["name"])
        assert text["source"].strip()
        import mlx.core as mx
        return [mx.zeros(s, d) for s, d in zip(arguments["output_shapes"], arguments["output_dtypes"])]
    return call
for name in dispatch.KERNELS:
    module = dispatch.kernel_module(name)
    for arguments in module.samples():
        module.run(factory, *arguments)
print(" ".join(sorted(set(texts))))
"""


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building leaves files in the source tree
    ignored = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
    )
    for name in ignored.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", folder, source], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with what the wheel installs."""
    site = wheel.parent / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


def test_the_command_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Which has nothing else but what the package needs; `tools/try_wheel.sh` downloads that too."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", wheel], check=True)
    (site,) = (tmp_path / "empty" / "lib").glob("python*/site-packages")
    (site / "needed.pth").write_text(
        str(Path(mlx_lm.__file__).parents[1])
    )  # without this checkout's own .pth
    model = save_tiny(tmp_path / "model", seed=3)
    kept = {**os.environ, "MTP_MLX_CACHE": str(tmp_path / "cache")}
    kept.pop("PYTHONPATH", None)

    def run(*words: str | Path) -> str:
        command = [python.parent / "mtp-mlx", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=kept, check=True, capture_output=True, text=True
        ).stdout

    assert run("--version").startswith("mtp-mlx, version ")
    assert len(run("generate", "-m", model, "-a", "none", "-p", "the fox", "-n", "8")) > 4
    found = subprocess.run(
        [python, "-c", "import mtp_mlx; print(mtp_mlx.__file__)"], cwd=tmp_path, env=kept, capture_output=True
    )
    assert found.stdout.decode().startswith(str(site))


def test_every_metal_source_is_in_the_wheel(installed: Path) -> None:
    shipped = {path.name for path in (installed / "mtp_mlx" / "metal_kernels").glob("*.metal")}
    assert shipped == {path.name for path in (ROOT / "metal_kernels").glob("*.metal")} != set()


def test_what_the_package_reads_is_in_the_wheel(installed: Path) -> None:
    """The page of the server, the memory and the adapters of the embedded model, published costs of rows."""
    patterns = ("serve/*.html", "memories/*.mem", "adapters/*/*.safetensors", "measure/*.json", "py.typed")
    for pattern in patterns:
        shipped = {path.name for path in (installed / "mtp_mlx").glob(pattern)}
        assert shipped == {path.name for path in (ROOT / "mtp_mlx").glob(pattern)} != set(), pattern


def test_kernels_launch_from_the_wheel(installed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, "-c", LAUNCH_ALL, str(installed)],
        env=environment,
        cwd=installed,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "small_m_qmm" in result.stdout and "verify_tail" in result.stdout


def test_the_emulator_is_not_in_the_wheel(installed: Path) -> None:
    assert {path.name for path in installed.iterdir()} <= {"mtp_mlx", "bin"} | {
        path.name for path in installed.glob("*.dist-info")
    }
