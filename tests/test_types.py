"""Proves that mypy sees the types of convert/ and metal_kernels/ where the rest of the package imports them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import check_types
import pytest

PROBE = """
from mtp_mlx.convert.read.torch_opcodes import Record
from mtp_mlx.metal_kernels.launch import Support

Record(3, 4)
Support("no bool")
reasons: list[int] = [Support(True).reason]
"""
FOUND = {
    5: ['Argument 1 to "Record"', 'Argument 2 to "Record"'],
    6: ['Argument 1 to "Support"'],
    7: ['has incompatible type "str"; expected "int"'],
}


def test_errors_across_the_boundary_are_found(tmp_path: Path) -> None:
    package = check_types.link_package(tmp_path)
    (package / "__init__.py").unlink()  # it names the whole library, which `make lint` checks
    (package / "__init__.py").touch()
    (package / "probe.py").write_text(PROBE)
    command = [sys.executable, "-m", "mypy", "--config-file", check_types.ROOT / "pyproject.toml"]
    command += ["--cache-dir", tmp_path / "cache", tmp_path / "mtp_mlx" / "probe.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    for line, messages in FOUND.items():
        for message in messages:
            assert any(
                f"probe.py:{line}: error" in text and message in text for text in done.stdout.splitlines()
            ), done.stdout
    assert f"Found {sum(map(len, FOUND.values()))} errors" in done.stdout


def test_the_links(tmp_path: Path) -> None:
    """Every module of the repository's packages is below the links once; what is gone loses its link."""
    package = check_types.link_package(tmp_path)
    (package / "gone.py").symlink_to(tmp_path / "nowhere.py")
    check_types.link_package(tmp_path)
    root = check_types.ROOT
    expected = {path.relative_to(root) for path in (root / "mtp_mlx").rglob("*.py")}
    for name in check_types.MAPPED:
        expected |= {Path("mtp_mlx") / path.relative_to(root) for path in (root / name).rglob("*.py")}
    found = {
        (link / path).relative_to(tmp_path)
        for link in [package, *(link for link in package.iterdir() if link.is_dir())]
        for path in link.glob("*.py" if link == package else "**/*.py")
    }
    assert found == expected


def test_the_mapped_folders_are_those_of_setup_py() -> None:
    tree = ast.parse((check_types.ROOT / "setup.py").read_text())
    (mapped,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MAPPED"
    )
    assert mapped == check_types.MAPPED


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("build/types/mtp_mlx/convert/trunk.py:3: error: x", "convert/trunk.py:3: error: x"),
        ("build/types/mtp_mlx/metal_kernels/race.py:1: note", "metal_kernels/race.py:1: note"),
        ("build/types/mtp_mlx/api.py:7: error: y", "mtp_mlx/api.py:7: error: y"),
        ("tools/mslemu/unit.py:2: error: z", "tools/mslemu/unit.py:2: error: z"),
    ],
)
def test_messages_name_the_files_themselves(said: str, shown: str) -> None:
    assert check_types.real_names(said) == shown
