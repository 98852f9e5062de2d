"""Proves that the package can be installed on every Python that it says it supports, in the ways that texts name."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lowest(requires_python: str) -> tuple[int, int]:
    """The lowest Python of a specifier such as ">=3.11"."""
    found = re.search(r">=\s*3\.(\d+)", requires_python)
    assert found, requires_python
    return 3, int(found[1])


def test_no_text_promises_a_package_that_is_not_on_an_index() -> None:
    """Neither pages nor messages; see docs/releasing.md, which says when this test may go."""
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for name in ("mtp_mlx", "convert", "metal_kernels", "examples"):
        texts += (ROOT / name).rglob("*.py")
    promise = re.compile(r"(pip|uv|pipx)( tool| pip)? install '?\"?mtp[-_]mlx")
    found = [path.name for path in texts if promise.search(path.read_text(encoding="utf-8"))]
    assert len(texts) > 100 and found == []


def test_no_dependency_needs_a_later_python() -> None:
    """Those that are installed here, and so those that pip chooses for the lowest versions of pyproject.toml."""
    names = [re.split(r"[\[<>=;]", requirement)[0] for requirement in PROJECT["dependencies"]]
    known = {}
    for name in names:
        try:
            known[name] = importlib.metadata.metadata(name)["Requires-Python"] or ">=3.0"
        except importlib.metadata.PackageNotFoundError:  # mlx has another name off the Mac
            continue
    assert "mlx-lm" in known
    later = {
        name: needed for name, needed in known.items() if lowest(needed) > lowest(PROJECT["requires-python"])
    }
    assert not later
