"""Reads the zip container of a PyTorch file: the pickle that describes the tensors, and where each storage lies.

`<archive>/data.pkl` is the pickle, `<archive>/data/<key>` holds the numbers of one storage, uncompressed, and
`<archive>/byteorder` is "little". The formats before PyTorch 1.6 (a bare pickle, a tar) are refused by name.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mtp_mlx.errors import ConversionError

SAVE_AGAIN = "save its plain tensors with torch.save(model.state_dict(), ...) and convert that"


@dataclass(frozen=True)
class Storage:
    """The bytes of a storage in the file."""

    offset: int
    n_bytes: int


def open_archive(path: Path) -> tuple[dict[str, Storage], bytes]:
    """The storages by key, and the pickle.

    Raises FileNotFoundError, or ConversionError: another format, damaged or truncated.
    """
    with path.open("rb") as stream:
        _check_format(path, stream.read(512))
        entries = _entries(path, stream)
        pickles = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ConversionError(
                f"{path}: a zip with {len(pickles)} data.pkl records, but a PyTorch file has one; {SAVE_AGAIN}"
            )
        root = pickles[0].split("/")[0]
        order, data = f"{root}/byteorder", f"{root}/data/"
        if order in entries and _bytes(stream, _span(path, stream, entries[order])) != b"little":
            raise ConversionError(
                f"{path}: saved on a big-endian machine, which is not supported; {SAVE_AGAIN}"
            )
        storages = {
            name.removeprefix(data): _span(path, stream, entry)
            for name, entry in entries.items()
            if name.startswith(data)
        }
        return storages, _bytes(stream, _span(path, stream, entries[pickles[0]]))


def _entries(path: Path, stream: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The zip's list of contents."""
    try:
        with zipfile.ZipFile(stream) as archive:
            return {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise ConversionError(
            f"{path}: the file is truncated or damaged (no list of contents at its end); get it again"
        ) from error


def _check_format(path: Path, start: bytes) -> None:
    if start[:4] == b"PK\x03\x04":
        return
    if start[257:262] == b"ustar":
        kind = "PyTorch's tar format (before 0.4)"
    elif start[:2] == b"\x80\x02" or start[:2] in (b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        kind = "a bare pickle, PyTorch's format before 1.6"
    else:
        raise ConversionError(f"{path}: not a PyTorch file (it does not begin as a zip); get the file again")
    raise ConversionError(f"{path}: {kind}, cannot be read; load it with PyTorch, then {SAVE_AGAIN}")


def _span(path: Path, stream: BinaryIO, info: zipfile.ZipInfo) -> Storage:
    """The bytes of a zip entry; torch does not compress, so compressed entries are refused."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ConversionError(f"{path}: the record {info.filename} is compressed or encrypted; {SAVE_AGAIN}")
    size = path.stat().st_size
    if 0 <= info.header_offset <= size - 30:
        stream.seek(info.header_offset)
        header = stream.read(30)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))  # the name, and extra fields
        if header[:4] == b"PK\x03\x04" and start + info.file_size <= size:
            return Storage(start, info.file_size)
    raise ConversionError(
        f"{path}: the file is truncated or damaged at its record {info.filename}; get it again"
    )


def _bytes(stream: BinaryIO, span: Storage) -> bytes:
    stream.seek(span.offset)
    return stream.read(span.n_bytes)
