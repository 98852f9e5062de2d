"""The header of one GGUF file: its metadata and the list of its tensors, read without touching the weights.

A model may lie in several such files (see `parts`). Truncated files are refused here, before any weights are read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mtp_mlx.errors import ConversionError

# GGUF value types -> struct codes; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # the format's own limit
HOW_TO_MEND = (
    "Get the file again, or convert the checkpoint to GGUF again with a current llama.cpp."  # ends errors
)

# Tensor type id -> (name, elements per block, bytes per block). Ids missing here are reported by number.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file. `shape` is in row-major order (the file stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int  # bytes from the start of the file
    n_bytes: int | None  # None where the type is unknown
    path: Path  # the file that holds it


@dataclass
class GGUFFile:
    """Header of a GGUF file: `metadata` by key, `tensors` by name. `files` are all that hold the model."""

    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def require(self, key: str) -> Any:
        """The metadata value of `key`; raises ConversionError where the file lacks it."""
        if key not in self.metadata:
            raise ConversionError(
                f"{self.path}: the metadata key {key!r} is missing; convert the checkpoint to GGUF again "
                "with a current llama.cpp."
            )
        return self.metadata[key]


class _Reader:
    def __init__(self, stream: BinaryIO, n_bytes: int) -> None:
        self.stream = stream
        self.n_bytes = n_bytes

    def take(self, n: int) -> bytes:
        # The bound also keeps a corrupt length field from asking for gigabytes.
        if n > self.n_bytes - self.stream.tell():
            raise EOFError
        return self.stream.read(n)

    def unpack(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def number(self, code: str) -> Any:
        return self.unpack(code)[0]

    def string(self, errors: str = "replace") -> str:
        return self.take(self.number("Q")).decode("utf-8", errors=errors)

    def value(self, kind: int, errors: str) -> Any:
        """One value of this type; `errors` is what becomes of text that is not UTF-8, as in `bytes.decode`."""
        if kind == _STRING:
            return self.string(errors)
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            return list(self.unpack(_SCALARS[inner], count))
        return [self.value(inner, errors) for _ in range(count)]


def read_file(path: Path) -> GGUFFile:
    """Read the header of the GGUF file at `path` (versions 2 and 3, little-endian), be it a whole model or a part.

    Raises FileNotFoundError, or ConversionError: not a GGUF file, damaged or truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        try:
            return _read_header(path, _Reader(stream, size))
        except EOFError:
            raise ConversionError(
                f"{path}: the file is truncated: its header does not end within its {size:,} bytes. "
                "Download or copy it again."
            ) from None
        except (struct.error, KeyError, TypeError, ValueError, RecursionError, ArithmeticError) as error:
            raise ConversionError(
                f"{path}: the GGUF header is damaged ({error!r}). Get the file again."
            ) from error


def _read_header(path: Path, reader: _Reader) -> GGUFFile:
    if reader.n_bytes < 4 or reader.take(4) != b"GGUF":
        raise ConversionError(f"{path}: not a GGUF file (it does not begin with the letters GGUF).")
    version = reader.number("I")
    if version not in (2, 3):
        raise ConversionError(
            f"{path}: GGUF version {version} is not supported, only 2 and 3 (little-endian) are."
        )
    n_tensors, n_pairs = reader.unpack("Q", 2)
    gguf = GGUFFile(path, files=[path])
    for _ in range(n_pairs):
        key = reader.string()
        gguf.metadata[key] = _value(path, reader, key)
    infos = [_tensor_header(reader) for _ in range(n_tensors)]
    alignment = int(gguf.metadata.get("general.alignment", 32))
    data_start = -(-reader.stream.tell() // alignment) * alignment
    for name, shape, type_id, offset in infos:
        if not name.isprintable():
            raise ValueError(f"a tensor is called {name}")
        if name in gguf.tensors:
            raise ConversionError(f"{path}: two tensors are called {name!r}. Get the file again.")
        type_name, block, block_bytes = TENSOR_TYPES.get(type_id, (f"type number {type_id}", 0, 0))
        n_elements = 1
        for n in shape:
            n_elements *= n
        if block and (shape[-1] if shape else 1) % block:
            raise ConversionError(
                f"{path}: the rows of tensor {name!r}, {list(shape)}, are not a multiple of {block}, the block size "
                f"of its type {type_name}. Get the file again."
            )
        n_bytes = n_elements // block * block_bytes if block else None
        info = TensorInfo(name, shape, type_name, data_start + offset, n_bytes, path)
        if info.offset + (n_bytes or 0) > reader.n_bytes:
            raise ConversionError(
                f"{path}: the file is truncated: tensor {name!r} ends at byte "
                f"{info.offset + (n_bytes or 0):,} but the file has {reader.n_bytes:,}. "
                "Download or copy it again."
            )
        gguf.tensors[name] = info
    return gguf


def _value(path: Path, reader: _Reader, key: str) -> Any:
    # Names and descriptions may be garbled; with a garbled token the model would read and write other text.
    errors = "strict" if key.startswith("tokenizer.") else "replace"
    try:
        return reader.value(reader.number("I"), errors)
    except UnicodeDecodeError:
        raise ConversionError(
            f"{path}: the metadata key {key!r} holds text that is not UTF-8. {HOW_TO_MEND}"
        ) from None


def _tensor_header(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.string()
    n_dimensions = reader.number("I")
    if n_dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {n_dimensions} dimensions")
    shape = tuple(reversed(reader.unpack("Q", n_dimensions)))
    return name, shape, reader.number("I"), reader.number("Q")
