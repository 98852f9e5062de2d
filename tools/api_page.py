"""Writes docs/api.md from the signatures and docstrings of the public names.

python tools/api_page.py            writes the page
python tools/api_page.py --check    exit code 1 if the page differs from what would be written
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import mtp_mlx

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
# Not exported at the top, but given to users by what is.
ALSO = ("mtp_mlx.model.attach.AttachedModel", "mtp_mlx.decode.step.Token", "mtp_mlx.decode.stats.DecodeStats",
        "mtp_mlx.distributed.join", "mtp_mlx.model.picture.block_text")  # fmt: skip
HEAD = """# Python API

<!-- Written by tools/api_page.py from the docstrings; a test compares. -->

`from mtp_mlx import ...`; the calls are those of mlx-lm, so that switching is one import. Names are imported on first
use: `import mtp_mlx` alone needs no MLX. Shapes are in square brackets: [B, R, D] is batch, rows, hidden size; V the
vocabulary.
"""


def shown(value: Any, name: str) -> str:
    """The call as one line of code."""
    try:
        signature = str(inspect.signature(value))
    except (TypeError, ValueError):
        return name
    signature = re.sub(r"ForwardRef\('([^']*)'\)", r"\1", signature)
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature).replace(" -> None", "")
    return f"{name}{signature}".rstrip()


def markdown(docstring: str) -> str:
    """A docstring as Markdown: sections in bold, their entries as lists, code as it is."""
    lines, out, section = inspect.cleandoc(docstring).splitlines(), [], False
    for line in lines:
        heading = re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", line)
        entry = re.match(r"    ([\w, |*]+): (.*)", line) if section else None
        if heading:
            out += ["", f"**{heading[1]}**", ""]
            section = True
        elif column := re.match(r"(\w+)  +(\S.*)", line):
            out.append(f"- `{column[1]}`: {column[2]}")
        elif line.startswith("     ") and out and out[-1].startswith(("-", "  ")):
            out.append("  " + line.strip())
        elif entry:
            out.append(f"- `{entry[1]}`: {entry[2]}")
        elif section and line.startswith("    "):
            out.append("  " + line.strip() if out and out[-1].startswith(("-", "  ")) else line.strip())
        else:
            section = section and not line.strip()
            out.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def entries() -> list[tuple[str, Any]]:
    """(name, object) of everything on the page."""
    found = [(f"mtp_mlx.{name}", getattr(mtp_mlx, name)) for name in mtp_mlx.__all__]
    for path in ALSO:
        module, name = path.rsplit(".", 1)
        found.append((path, getattr(importlib.import_module(module), name)))
    return found


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for path, value in entries():
        name = path.rsplit(".", 1)[-1]
        parts.append(f"## {name}\n\n    {shown(value, path)}\n\n{markdown(value.__doc__ or '')}\n")
        if inspect.isclass(value):
            for attribute, member in inspect.getmembers(value, inspect.isfunction):
                if (
                    not attribute.startswith("_")
                    and member.__doc__
                    and member.__module__.startswith("mtp_mlx")
                ):
                    first = inspect.cleandoc(member.__doc__).split("\n\n")[0].replace("\n", " ")
                    parts.append(f"- `{attribute}`: {first}")
            parts.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
