"""Check types with mypy: `python tools/check_types.py [MYPY OPTIONS]`, as `make lint`, pre-commit and CI do.

convert/ and metal_kernels/ are folders at the top of the repository, but sub-packages of mtp_mlx on import
(setup.py). mypy does not know this, so it gets a tree of links in which they are where they are imported from:

    build/types/mtp_mlx/<name>       -> mtp_mlx/<name>, for every file and folder
    build/types/mtp_mlx/convert      -> convert
    build/types/mtp_mlx/metal_kernels -> metal_kernels

Messages name the real files. Once the tree exists, plain `mypy` works too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TREE = ROOT / "build" / "types"
PACKAGE = "mtp_mlx"
MAPPED = ("convert", "metal_kernels")  # as in setup.py


def link_package(tree: Path = TREE) -> Path:
    """Bring the links in `tree` up to date; returns the folder of the package in it."""
    package = tree / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / PACKAGE).iterdir() if path.name != "__pycache__"}
    wanted |= {name: ROOT / name for name in MAPPED}
    for link in package.iterdir():
        if link.is_symlink() and link.name not in wanted:
            link.unlink()
    for name, path in wanted.items():
        link = package / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(path, package), target_is_directory=path.is_dir())
    return package


def real_names(text: str) -> str:
    """mypy's output with the real names of files."""
    package = f"{TREE.relative_to(ROOT)}/{PACKAGE}/"
    for name in MAPPED:
        text = text.replace(f"{package}{name}/", f"{name}/")
    return text.replace(package, f"{PACKAGE}/")


def main(arguments: list[str]) -> int:
    """Run mypy; returns its exit code."""
    link_package()
    colour = {"MYPY_FORCE_COLOR": "1"} if sys.stdout.isatty() else {}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments],
        cwd=ROOT,
        env=colour | os.environ,
        capture_output=True,
        text=True,
    )
    print(real_names(done.stdout), end="")
    print(real_names(done.stderr), end="", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
