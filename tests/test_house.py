"""Proves the rules of the house: sizes, arrows that point down, no circles, drafters named only at home."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = ("convert", "metal_kernels")  # folders at the top that are sub-packages of mtp_mlx
LONGEST_FILE, LONGEST_FUNCTION, MOST_IN_DECODE, LONGEST_README = 420, 60, 18, 110

# What a room may import of the package: itself, and rooms below it.
BELOW: dict[str, tuple[str, ...]] = {
    "metal_kernels": (),
    "convert": ("drafters", "model"),
    "model": ("metal_kernels",),
    "decode": ("model", "metal_kernels"),
    "train": ("decode", "model", "metal_kernels"),
    "planning": ("drafters.registry", "decode", "model", "metal_kernels"),
    "drafters": ("train", "planning", "decode", "model", "metal_kernels"),
    "measure": (
        "api",
        "conversation",
        "drafters.registry",
        "planning",
        "train",
        "decode",
        "model",
        "metal_kernels",
    ),
    "serve": (
        "api",
        "conversation",
        "drafters.registry",
        "planning",
        "train",
        "decode",
        "model",
        "metal_kernels",
    ),
}
FREE = ("decode", "planning", "model", "train", "serve", "measure", "cli", "api")  # they name no drafter


def sources() -> list[Path]:
    """Every Python file of the package that is or will be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split() if (ROOT / name).exists()]


def package() -> dict[str, Path]:
    """{dotted name: file} of everything that is imported as mtp_mlx."""
    found = {}
    for path in sources():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in MAPPED:
            parts = ("mtp_mlx", *parts)
        if parts[0] == "mtp_mlx":
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


@lru_cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, known: set[str], whole: bool) -> set[str]:
    """Modules of the package that a file imports: anywhere in it, or when it is imported itself."""
    tree = tree_of(path)
    nodes = list(ast.walk(tree)) if whole else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def test_files_and_functions_fit() -> None:
    long_files, long_functions = [], []
    for path in sources():
        name = str(path.relative_to(ROOT))
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > LONGEST_FILE:
            long_files.append(f"{name}: {lines} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > LONGEST_FUNCTION:
                    long_functions.append(f"{name}:{node.lineno} {node.name}: {size} lines")
    assert not long_files and not long_functions


def test_rooms_that_stay_small() -> None:
    assert len(list((ROOT / "mtp_mlx" / "decode").glob("*.py"))) <= MOST_IN_DECODE
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


def test_no_circle_of_imports() -> None:
    """Modules sorted so that each stands behind what it imports when it is imported."""
    files = package()
    known = set(files)
    waiting = {name: imports(path, known, whole=False) - {name} for name, path in files.items()}
    while waiting:
        ready = {name for name, needs in waiting.items() if not needs & set(waiting)}
        assert ready, f"a circle of imports among {sorted(waiting)}"
        waiting = {name: needs for name, needs in waiting.items() if name not in ready}


@pytest.mark.parametrize("room", BELOW)
def test_arrows_point_down(room: str) -> None:
    """Imports inside functions count as well."""
    files, wrong = package(), []
    assert any(f"{name}.".startswith(f"mtp_mlx.{room}.") for name in files)
    others = tuple(name for name in (*BELOW, *MAPPED, "cli", "api", "conversation") if name != room)
    for name, path in files.items():
        if not f"{name}.".startswith(f"mtp_mlx.{room}."):
            continue
        for found in imports(path, set(files), whole=True):
            target = found.removeprefix("mtp_mlx.")
            allowed = any(target == below or target.startswith(f"{below}.") for below in BELOW[room])
            if target.split(".")[0] in others and not allowed:
                wrong.append(f"{name} -> {found}")
    assert not wrong


@pytest.mark.parametrize("room", FREE)
def test_nothing_else_asks_what_kind_of_drafter_it_is(room: str) -> None:
    """No import from drafters/ but the registry, and no isinstance of a drafter, an adapter or a head."""
    kinds = re.compile(r"Adapter|Heads?\b|Drafter|Slots|Medusa|PTP|DraftModel|Speculator|DraftSource")
    wrong = []
    assert any(f"{name}.".startswith(f"mtp_mlx.{room}.") for name in package())
    for name, path in package().items():
        if name != f"mtp_mlx.{room}" and not name.startswith(f"mtp_mlx.{room}."):
            continue
        for found in imports(path, set(package()), whole=True):
            if found.startswith("mtp_mlx.drafters") and found not in (
                "mtp_mlx.drafters",
                "mtp_mlx.drafters.registry",
            ):
                wrong.append(f"{name} imports {found}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                asked = ast.unparse(node.args[1])
                if kinds.search(asked):
                    wrong.append(f"{name}:{node.lineno} asks for {asked}")
    assert not wrong
