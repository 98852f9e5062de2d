"""Writes PyTorch's zip files without PyTorch: pickles put together opcode by opcode.

write_torch(path, {"w": Tensor(array)})                     as torch.save({"w": tensor}, path) would
write_zip(path, pickled, {"0": b"..."})                     any pickle, with its storages
pickled(Call("os", "system", ("true",)))                    what a hostile file may hold
"""

from __future__ import annotations

import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclass
class Tensor:
    """A tensor as torch.save stores it. `data` is the storage; shape and strides default to the whole of it.

    dtype: torch's name where numpy has no such type ("bfloat16", "float8_e4m3fn"); `data` are its bits.
    """

    data: np.ndarray
    shape: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    offset: int = 0
    dtype: str = ""
    parameter: bool = False


@dataclass
class Global:
    """The name `module.name`."""

    module: str
    name: str


@dataclass
class Call:
    """`module.name(*args)`."""

    module: str
    name: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Opcodes:
    """Bytes put into the pickle as they are."""

    code: bytes


class _Writer:
    def __init__(self) -> None:
        self.storages: dict[str, bytes] = {}

    def dump(self, value: Any) -> bytes:  # noqa: C901, PLR0911 - one line for each kind of object
        if isinstance(value, Opcodes):
            return value.code
        if isinstance(value, Global):
            return f"c{value.module}\n{value.name}\n".encode()
        if isinstance(value, Call):
            return self.dump(Global(value.module, value.name)) + self.dump(value.args) + b"R"
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            start = self.dump(Call("collections", "OrderedDict")) if isinstance(value, OrderedDict) else b"}"
            return start + b"(" + b"".join(self.dump(x) for pair in value.items() for x in pair) + b"u"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.dump, value)) + b"t"
        if isinstance(value, list):
            return b"](" + b"".join(map(self.dump, value)) + b"e"
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        if isinstance(value, int):
            return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        text = value.encode()
        return b"X" + len(text).to_bytes(4, "little") + text

    def _tensor(self, tensor: Tensor) -> bytes:
        data = np.ascontiguousarray(tensor.data)
        key = str(len(self.storages))
        self.storages[key] = data.tobytes()
        shape = tensor.data.shape if tensor.shape is None else tensor.shape
        strides = tensor.strides
        if strides is None:
            strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        dtype = tensor.dtype or data.dtype.name
        kind = {**STORAGES, "bfloat16": "BFloat16Storage"}.get(dtype)
        storage_type = Global("torch", kind) if kind else Global("torch.storage", "UntypedStorage")
        count = data.size if kind else data.nbytes
        storage = Opcodes(self.dump(("storage", storage_type, key, "cpu", count)) + b"Q")
        args: tuple[Any, ...] = (storage, tensor.offset, shape, strides, False, OrderedDict())
        if kind:
            call = Call("torch._utils", "_rebuild_tensor_v2", args)
        else:
            call = Call("torch._utils", "_rebuild_tensor_v3", (*args, Global("torch", dtype)))
        if tensor.parameter:
            call = Call("torch._utils", "_rebuild_parameter", (call, True, OrderedDict()))
        return self.dump(call)


def pickled(value: Any) -> bytes:
    """A pickle of `value` (protocol 2)."""
    return b"\x80\x02" + _Writer().dump(value) + b"."


def write_zip(path: Path, pickle: bytes, storages: dict[str, bytes], byteorder: bytes = b"little") -> Path:
    """A PyTorch zip with this data.pkl and these storages."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return path


def write_torch(path: Path, value: Any) -> Path:
    """What torch.save(value, path) writes; tensors are `Tensor` or numpy arrays."""
    writer = _Writer()
    return write_zip(path, b"\x80\x02" + writer.dump(_tensors(value)) + b".", writer.storages)


def _tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return Tensor(value)
    if isinstance(value, dict):
        return type(value)((key, _tensors(item)) for key, item in value.items())
    return value
