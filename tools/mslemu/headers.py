"""A copy of MLX's Metal headers, adapted so that clang reads them as the Metal compiler does.

MLX's wheel contains the headers of its kernels. All kernels include utils.h; MLX's own kernels, which are run to
prove the emulator right, include the others.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx

from .prepare import prepare

MLX_INCLUDE = Path(mx.__file__).parent / "include"
KERNELS = Path("mlx/backend/metal/kernels")
_IN_SHIM = ("complex.h", "logging.h")  # shim/ has its own

_ARRAY_PARAMETER = re.compile(r"(constant const int64_t) strides\[\d\]")
_FUNCTION_CONSTANT = re.compile(r"constant (\w+) (\w+) \[\[function_constant\((\d+)\)\]\];")
_ARGUMENT_INDEX = re.compile(r"\[\[threadgroup\(\d+\)\]\]")
_ONLY_SPACES_DIFFER = re.compile(
    r"(template <typename T>\nstruct pointer_element<(?:device|constant|threadgroup) T\*> \{\n[^}]*\};)"
)
_CONSTANT_AS_MACRO = r"""
#ifndef MSL_FC_\3
#define MSL_FC_\3 0
#endif
constant constexpr const \1 \2 = MSL_FC_\3;"""


def _as_cpp(text: str, name: str) -> str:
    text = prepare(text, name)
    text = _ARRAY_PARAMETER.sub(
        r"\1* strides", text
    )  # clang does not allow array parameters in an address space
    # Metal sets function constants when it loads a kernel; here a macro sets them before the include
    text = _FUNCTION_CONSTANT.sub(_CONSTANT_AS_MACRO, text)
    text = _ARGUMENT_INDEX.sub("", text)
    # specialisations that are equal without address spaces
    return _ONLY_SPACES_DIFFER.sub(r"#if defined(MSL_AS_CHECK)\n\1\n#endif", text)


def copy_headers(target: Path) -> None:
    """Create `target` in one step, so that other processes see all of it or nothing."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent))
    for source in sorted((MLX_INCLUDE / KERNELS).rglob("*")):
        if source.is_file() and source.name not in _IN_SHIM:
            copy = unfinished / source.relative_to(MLX_INCLUDE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_as_cpp(source.read_text(encoding="utf-8"), source.name), encoding="utf-8")
    try:
        os.rename(unfinished, target)
    except OSError:  # another process was first
        shutil.rmtree(unfinished)
