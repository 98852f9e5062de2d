"""Finds clang, compiles kernels and the runtime, and caches the results.

Every file in the cache is named by a digest of all that it depends on, and is moved into place when complete, so that
processes can share the folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

from .errors import KernelError
from .headers import KERNELS, copy_headers
from .lint import lint
from .options import Options
from .text import KernelSpec, Signature, Template
from .unit import translation_unit

HERE = Path(__file__).parent
OLDEST_CLANG = 17  # the first with arithmetic on both _Float16 and __bf16
_NO_CLANG = (
    f"the emulator needs clang++ >= {OLDEST_CLANG}: install it (apt-get install clang-19, or pip install ziglang) "
    "or name it in MSLEMU_CXX"
)

_LANGUAGE_FLAGS = [
    "-std=c++14",
    "-nostdinc",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Xclang",
    "-cl-single-precision-constant",
    # round half and bfloat after every operation, like an ALU of that width
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-Wno-unknown-attributes",
    "-Wno-c++17-extensions",
    "-Wno-literal-range",
    "-Wno-unknown-pragmas",
    "-Wno-duplicate-decl-specifier",
]
_MODE_FLAGS = {
    "fast": ["-O2"],
    "check": [
        "-O1",
        "-gline-tables-only",
        "-gdwarf-4",
        "-ftrivial-auto-var-init=pattern",  # an uninitialised float is NaN
        "-fsanitize=thread",  # runtime/hooks.h implements the functions it calls
        "-mllvm",
        "-tsan-instrument-func-entry-exit=0",
        "-fsanitize=bounds,shift-exponent,integer-divide-by-zero,signed-integer-overflow,alignment",
        "-fno-sanitize-trap=all",
    ],
}


def cache_folder() -> Path:
    """The folder of compiled kernels: MSLEMU_CACHE, else the user's cache folder, else a temporary one."""
    chosen = os.environ.get("MSLEMU_CACHE")
    if chosen:
        folder = Path(chosen)
        folder.mkdir(parents=True, exist_ok=True)
        return folder.absolute()
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (user_cache / "mslemu", Path(tempfile.gettempdir()) / f"mslemu-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder.absolute()
    raise KernelError("no folder for compiled kernels can be written: name one in MSLEMU_CACHE")


# ---------------------------------------------------------------------------------------------- finding clang


def find_clang() -> list[str]:
    """The command of a clang that is new enough.

    Raises:
        KernelError: if there is none, or this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise KernelError(f"the emulator runs on Linux, not on {sys.platform}")
    return _find_clang(os.environ.get("MSLEMU_CXX", ""), os.environ.get("PATH", ""))


@cache
def _find_clang(named: str, path: str) -> list[str]:
    if named:
        command = shlex.split(named)
        if _clang_version(command) < OLDEST_CLANG:
            raise KernelError(f"MSLEMU_CXX={named} is not clang++ >= {OLDEST_CLANG}")
        return command
    for suffix in ("-22", "-21", "-20", "-19", "-18", "-17", ""):
        found = shutil.which("clang++" + suffix, path=path)
        if found and _clang_version([found]) >= OLDEST_CLANG:
            return [found]
    zig = [sys.executable, "-m", "ziglang", "clang", "-target", f"{platform.machine()}-linux-gnu"]
    if _clang_version(zig) >= OLDEST_CLANG:  # pip install ziglang, which includes clang
        return zig
    raise KernelError(_NO_CLANG)


def _version_text(command: list[str]) -> str:
    try:
        return subprocess.run([*command, "--version"], check=False, capture_output=True, text=True).stdout
    except OSError:
        return ""


def _clang_version(command: list[str]) -> int:
    found = re.search(r"clang version (\d+)", _version_text(command))
    return int(found.group(1)) if found else 0


def _linker() -> list[str]:
    return ["cc"] if shutil.which("cc") else find_clang()


def _run(command: list[str], what: str) -> str:
    """Run the command and return its standard error; raises KernelError with it if the command fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [k for k, line in enumerate(lines) if ": error:" in line or ": fatal error:" in line]
        shown = "\n".join("\n".join(lines[k : k + 3]) for k in errors[:8]) if errors else done.stderr
        raise KernelError(f"{what} failed\n{shown}")
    return done.stderr


# ---------------------------------------------------------------------------------------------- digests


def _digest(*parts: str | bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
        total.update(b"\0")
    return total.hexdigest()[:24]


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _digest(*(part for path in files for part in (str(path.relative_to(folder)), path.read_bytes())))


@cache
def _shim_digest() -> str:
    return _folder_digest(HERE / "shim")


@cache
def _compiler_digest(command: tuple[str, ...]) -> str:
    return _digest(*command, _version_text(list(command)))


@cache
def _headers_name() -> str:
    changes = [(HERE / name).read_bytes() for name in ("headers.py", "prepare.py", "tokens.py")]
    return f"mlx-{version('mlx')}-{_digest(str(KERNELS), *changes)}"


# ---------------------------------------------------------------------------------------------- compiling


@cache
def _processor_flags() -> list[str]:
    """Flags for half conversions in hardware, if the processor has them: half is slow without."""
    if platform.machine() != "x86_64":
        return []
    try:
        has_avx2 = "avx2" in Path("/proc/cpuinfo").read_text()
    except OSError:
        has_avx2 = False
    return ["-march=x86-64-v3"] if has_avx2 else []


def _move_into_place(made: Path, target: Path) -> None:
    os.replace(made, target)


@cache
def runtime_library() -> Path:
    """The compiled runtime, on which every kernel's library depends; the same for the life of the process."""
    compiler = [shutil.which("g++") or "g++"] if shutil.which("g++") else find_clang()
    digest = _digest(_folder_digest(HERE / "runtime"), _compiler_digest(tuple(compiler)))
    target = cache_folder() / f"runtime-{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            built, library = Path(scratch, "runtime.o"), Path(scratch, "runtime.so")
            flags = ["-O2", "-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti"]
            source = str(HERE / "runtime" / "runtime.cpp")
            _run([*compiler, *flags, "-c", source, "-o", str(built)], "building the runtime")
            _run([*_linker(), "-shared", str(built), "-o", str(library)], "linking the runtime")
            _move_into_place(library, target)
    return target


def compile_kernel(spec: KernelSpec, front: Signature, template: Template, chosen: Options) -> Path:
    """The library of one specialisation.

    Raises:
        KernelError: if the source breaks a rule of Metal or does not compile; it names the author's lines.
    """
    clang = find_clang()
    unit = translation_unit(spec, front, template, chosen)
    base_flags = _LANGUAGE_FLAGS + _processor_flags()
    digest = _digest(
        unit,
        " ".join(base_flags + _MODE_FLAGS[chosen.mode]),
        _compiler_digest(tuple(clang)),
        _shim_digest(),
        _headers_name(),
        str(chosen.address_spaces),
    )
    target = cache_folder() / f"{spec.name}-{digest}.so"
    if target.exists():
        return target
    lint(spec.header, f"{spec.name}.header.metal", function_body=False)
    lint(spec.source, f"{spec.name}.metal", function_body=True)
    headers = cache_folder() / _headers_name()
    copy_headers(headers)
    command = [*clang, *base_flags, "-I", str(HERE / "shim"), "-I", str(headers)]
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        source, built, library = (Path(scratch, f"kernel.{suffix}") for suffix in ("cpp", "o", "so"))
        source.write_text(unit, encoding="utf-8")
        if chosen.address_spaces:
            _check_address_spaces(command, source, spec.name)
        compile_only = [*_MODE_FLAGS[chosen.mode], "-fPIC", "-c", str(source), "-o", str(built)]
        _run([*command, *compile_only], f"{spec.name}: compile")
        _run([*_linker(), "-shared", str(built), "-o", str(library), "-lm"], f"{spec.name}: link")
        _move_into_place(library, target)
    return target


def _check_address_spaces(command: list[str], source: Path, name: str) -> None:
    """Compile with device, constant and threadgroup as distinct address spaces, only to find errors.

    Metal has no implicit conversion to bfloat (Metal Shading Language Specification, 2.1), but clang does.
    """
    flags = ["-DMSL_AS_CHECK", "-fsyntax-only", "-Wimplicit-float-conversion"]
    warnings = _run([*command, *flags, str(source)], f"{name}: Metal check")
    refused = [
        line
        for line in warnings.splitlines()
        if "implicit conversion" in line
        and re.search(r"to '(__bf16|bfloat\w*|bfloat'.*)'?", line)
        and f"{name}." in line
    ]
    if refused:
        raise KernelError("Metal does not convert to bfloat implicitly:\n" + "\n".join(refused))
