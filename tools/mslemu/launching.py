"""Passes a compiled kernel, its buffers and its grid to the runtime, and reads the results."""

from __future__ import annotations

import ctypes
import mmap
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .compiler import runtime_library
from .errors import KernelError
from .options import ORDERS, Options
from .types import MAX_THREADGROUP_BYTES

_EMPTY_SPACE = 65536  # unused bytes on both sides of a buffer
_PAGE = 4096
_VECTOR = 16  # alignment of the widest load


@dataclass(frozen=True)
class Traffic:
    """Counts of one launch. Bytes are counted in mode "check"; in mode "fast" they stay 0.

    An atomic read-modify-write counts as a write. `traffic["read"]["w"]` is `traffic.read["w"]`.

    Attributes:
        read, written: bytes by buffer.
        loads: read accesses by buffer, however wide.
        threadgroups, barriers, simd_ops: how many ran; barriers and simd operations count once per group.
        threadgroup_bytes: bytes of threadgroup memory.
    """

    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    threadgroups: int = 0
    barriers: int = 0
    simd_ops: int = 0
    threadgroup_bytes: int = 0

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None


class Buffer:
    """One argument of a kernel, in memory with empty space around it.

    The data end at the empty space (to within 16 bytes, to keep vector loads aligned), so an overrun hits no other
    buffer.
    """

    def __init__(self, name: str, nbytes: int, *, writable: bool, initialised: bool) -> None:
        pages = -(-max(nbytes, 1) // _PAGE) * _PAGE
        offset = _EMPTY_SPACE + (pages - nbytes) // _VECTOR * _VECTOR
        self._memory = mmap.mmap(-1, pages + 2 * _EMPTY_SPACE)
        self.name = name
        self.writable = writable
        self.initialised = initialised
        self.bytes = np.frombuffer(self._memory, dtype=np.uint8, count=nbytes, offset=offset)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + offset


class _Region(ctypes.Structure):
    """`Region` of runtime/launch.h."""

    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("writable", ctypes.c_int32),
        ("initialised", ctypes.c_int32),
        ("shadow", ctypes.c_void_p),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("loads", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
    ]


class _Launch(ctypes.Structure):
    """`Launch` of runtime/launch.h."""

    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("regions", ctypes.c_void_p),
        ("region_count", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("shared_begin", ctypes.c_void_p),
        ("shared_end", ctypes.c_void_p),
        ("image_begin", ctypes.c_void_p),
        ("image_end", ctypes.c_void_p),
        ("check", ctypes.c_int32),
        ("order", ctypes.c_int32),
        ("strict", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("failed", ctypes.c_int32),
        ("threadgroups", ctypes.c_int32),
        ("barriers", ctypes.c_uint64),
        ("simd_ops", ctypes.c_uint64),
        ("failed_at", ctypes.c_uint64),
        ("message", ctypes.c_char * 1024),
    ]


# Every launch uses the same fibres, and a call into the runtime releases Python's global lock.
_one_at_a_time = threading.Lock()


@cache
def _runtime(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@dataclass(frozen=True)
class Library:
    """A loaded kernel, with the addresses of its threadgroup variables and of its whole image."""

    path: Path
    entry: int
    shared: tuple[int, int]
    image: tuple[int, int]

    @property
    def threadgroup_bytes(self) -> int:
        """The size of all threadgroup variables."""
        return self.shared[1] - self.shared[0]


@cache
def load(path: Path) -> Library:
    """Load a compiled kernel, only once."""
    _runtime(runtime_library())
    library = ctypes.CDLL(str(path))
    ranges = (ctypes.c_void_p * 4)()
    library.msl_ranges(ranges)
    shared_begin, shared_end, image_begin, image_end = (address or 0 for address in ranges)
    entry = ctypes.cast(library.msl_entry, ctypes.c_void_p).value or 0
    return Library(path, entry, (shared_begin, shared_end), (image_begin, image_end))


def _source_line(library: Library, address: int) -> str:
    """ " at name.metal:12" for an address inside the kernel, or "" if no tool can tell."""
    tools = ("llvm-symbolizer-19", "llvm-symbolizer", "addr2line")
    tool = next((found for found in map(shutil.which, tools) if found), None)
    if not address or not tool:
        return ""
    place = hex(address - 1 - library.image[0])  # the call before the return address
    command = [tool, "-i", "-e", str(library.path), place]
    told = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    found = re.search(r"[\w.\-]+\.metal:\d+", told)
    return f" at {found.group()}" if found else ""


def launch(
    name: str,
    library: Library,
    buffers: Sequence[Buffer],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    chosen: Options,
) -> tuple[Traffic, str]:
    """Run every thread of the grid; returns the counts, and an error message or "".

    Raises:
        KernelError: if there is too much threadgroup memory; the kernel is not run then.
    """
    if library.threadgroup_bytes > MAX_THREADGROUP_BYTES:
        raise KernelError(
            f"{name}: {library.threadgroup_bytes} bytes of threadgroup memory; the limit is {MAX_THREADGROUP_BYTES}"
        )
    addresses = (ctypes.c_void_p * len(buffers))(*(buffer.address for buffer in buffers))
    regions = (_Region * len(buffers))(
        *(
            _Region(b.address, b.bytes.nbytes, b.writable, b.initialised, None, 0, 0, 0, b.name.encode())
            for b in buffers
        )
    )
    call = _Launch(
        entry=library.entry,
        buffers=ctypes.addressof(addresses),
        regions=ctypes.addressof(regions),
        region_count=len(buffers),
        grid=tuple(grid),
        threadgroup=tuple(threadgroup),
        shared_begin=library.shared[0],
        shared_end=library.shared[1],
        image_begin=library.image[0],
        image_end=library.image[1],
        check=chosen.mode == "check",
        order=ORDERS.index(chosen.order),
        strict=chosen.strict,
        seed=chosen.seed + 1,
    )
    with _one_at_a_time:
        _runtime(runtime_library()).msl_launch(ctypes.byref(call))
    traffic = Traffic(
        read={region.name.decode(): region.bytes_read for region in regions},
        written={region.name.decode(): region.bytes_written for region in regions if region.writable},
        loads={region.name.decode(): region.loads for region in regions},
        threadgroups=call.threadgroups,
        barriers=call.barriers,
        simd_ops=call.simd_ops,
        threadgroup_bytes=library.threadgroup_bytes,
    )
    if call.failed:
        return traffic, f"{name}: {call.message.decode()}{_source_line(library, call.failed_at)}"
    return traffic, ""
