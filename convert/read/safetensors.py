"""Reads safetensors files, single or sharded with an index, and fp8 weights with block scales.

Layout of a file: 8 bytes, the length of the header (little-endian); the header, JSON: name -> dtype, shape,
data_offsets [begin, end); then the numbers. The whole header is checked first, so that a truncated file is refused
before anything is converted; the numbers are mapped from the file on demand.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtp_mlx.convert.read.lazy_tensor import FLOATS, STORED_AS, LazyTensor, from_float32
from mtp_mlx.errors import ConversionError

SUFFIX = ".safetensors"
_MAX_SIZE = 2**62
_MAX_DIMENSIONS = 64  # numpy's limit
SCALE = "_scale_inv"  # <name>.weight is fp8, <name>.weight_scale_inv holds one factor for each block
_MAX_HEADER = 100_000_000  # the format's own limit


def read_safetensors(path: str | Path) -> dict[str, LazyTensor]:
    """Every tensor of one file, by name.

    Raises FileNotFoundError, or ConversionError: not a safetensors file, truncated, or of an unknown type.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8 or length > _MAX_HEADER:
            raise ConversionError(
                f"{path}: truncated, or not a safetensors file (its header should have {length:,} bytes, the file "
                f"has {size:,}); download or copy it again"
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
        entries = {name: _entry(value, size) for name, value in header.items() if name != "__metadata__"}
        odd = next((name for name in entries if not name.isprintable()), None)
        if odd is not None:  # printed, it could control the terminal
            raise ValueError(f"a tensor is called {ascii(odd)}")
        _check_apart(entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{path}: its header is damaged ({error}); download or copy it again"
        ) from error
    return {name: _tensor(path, name, *entry, data=8 + length, size=size) for name, entry in entries.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError if it has a name twice, since two tensors would share it."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name}' is in it twice")
        found[name] = value
    return found


def _entry(value: Any, size: int) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, begin and end of a tensor in a file of `size` bytes."""
    begin, end = value["data_offsets"]
    dtype, shape = value["dtype"], value["shape"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("a type or a shape is not as the format requires")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("a shape or an offset is not a whole number")
    if any(n > _MAX_SIZE for n in (*shape, begin, end)):
        raise ValueError(f"a shape or an offset is impossible in a file of {size:,} bytes")
    return dtype, tuple(shape), begin, end


def _check_apart(entries: Mapping[str, tuple[str, tuple[int, ...], int, int]]) -> None:
    """Raises ValueError if two tensors share bytes, since one of them must then be wrong."""
    spans = sorted((begin, end, name) for name, (_, _, begin, end) in entries.items() if begin < end)
    for (_, end, one), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"'{one}' and '{other}' share bytes")


def _tensor(
    path: Path, name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int, *, data: int, size: int
) -> LazyTensor:
    if dtype not in STORED_AS:
        raise ConversionError(
            f"{path}: tensor '{name}' has the type {dtype}, which is not supported (known: {', '.join(STORED_AS)}); "
            "use a checkpoint of another precision"
        )
    n_bytes = math.prod(shape) * np.dtype(STORED_AS[dtype]).itemsize
    if end - begin != n_bytes:
        raise ConversionError(
            f"{path}: tensor '{name}', {dtype} {list(shape)}, needs {n_bytes:,} bytes but has {end - begin:,} in the "
            "header; download or copy the file again"
        )
    if data + end > size:
        raise ConversionError(
            f"{path}: the file is truncated: tensor '{name}' ends at byte {data + end:,} but the file has {size:,}; "
            "download or copy it again"
        )
    return LazyTensor(dtype, shape, lambda: _read(path, dtype, shape, data + begin))


def _read(path: Path, dtype: str, shape: tuple[int, ...], start: int) -> np.ndarray:
    kind = np.dtype(STORED_AS[dtype])
    if 0 in shape:
        return np.zeros(shape, kind)
    n_bytes = math.prod(shape) * kind.itemsize
    return np.asarray(np.memmap(path, np.uint8, "r", start, (n_bytes,))).view(kind).reshape(shape)


# --- shards -------------------------------------------------------------------------------------------------


def shard_files(index: Path) -> dict[str, list[str]]:
    """The files that an index names, with the tensors that each should hold.

    Raises ConversionError: the index is damaged, or names files that are missing or outside its folder.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(str(file), []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{index}: the index is damaged ({error!r}); download or copy it again"
        ) from error
    outside = sorted(file for file in files if Path(file).name != file)
    if outside:
        raise ConversionError(
            f"{index}: names files outside its own folder ({outside[0]}), which are not read"
        )
    missing = sorted(file for file in files if not (index.parent / file).is_file())
    if missing:
        raise ConversionError(
            f"{index}: names {len(files)} files, {len(missing)} of which are missing: {_some(missing)}; "
            "download or copy them into the folder"
        )
    return files


def merge(parts: Mapping[Path, Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """The tensors of several files.

    Raises ConversionError: two files have a tensor of the same name.
    """
    origin: dict[str, Path] = {}
    merged: dict[str, LazyTensor] = {}
    for path, tensors in parts.items():
        for name, tensor in tensors.items():
            if name in merged:
                raise ConversionError(
                    f"{path}: tensor '{name}' is in {origin[name].name} too; keep only one of the two files"
                )
            merged[name], origin[name] = tensor, path
    return merged


def check_index(index: Path, files: Mapping[str, Sequence[str]], tensors: Mapping[str, LazyTensor]) -> None:
    """Raises ConversionError if the index names tensors that are in none of its files."""
    lost = sorted(name for names in files.values() for name in names if name not in tensors)
    if lost:
        raise ConversionError(
            f"{index}: names {len(lost)} tensors that its files do not hold: {_some(lost)}; the download is "
            "incomplete or of several versions, get it again"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- fp8 ----------------------------------------------------------------------------------------------------


def dequantised(
    tensors: Mapping[str, LazyTensor], where: Path, block: tuple[int, int] = (128, 128)
) -> dict[str, LazyTensor]:
    """`tensors` without scales: each fp8 weight is multiplied by its own when it is read, to bfloat16.

    An fp8 weight [..., M, N] has scales [..., ceil(M / block[0]), ceil(N / block[1])].

    Raises ConversionError: fp8 tensors without scales or with scales of another shape (one message lists them all).
    """
    out: dict[str, LazyTensor] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        if tensor.dtype != "F8_E4M3":
            if not _scales_of(name, tensors):
                out[name] = tensor
            continue
        scales = tensors.get(name + SCALE)
        wanted = _blocks(tensor.shape, block)
        if len(tensor.shape) < 2:
            problems.append(f"'{name}' is {list(tensor.shape)}, not a matrix")
        elif scales is None or scales.dtype not in FLOATS:
            problems.append(f"'{name}' has no scales '{name + SCALE}' of a float type")
        elif scales.shape != wanted:
            problems.append(f"'{name + SCALE}' is {list(scales.shape)}, {list(wanted)} expected")
        else:
            out[name] = LazyTensor("BF16", tensor.shape, _scaled(tensor, scales, block))
    if problems:
        raise ConversionError(
            f"{where}: fp8 weights need one scale for each block of {block[0]} x {block[1]}: {_some(problems)}; use "
            "the bfloat16 checkpoint"
        )
    return out


def _scales_of(name: str, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether `name` holds the scales of an fp8 weight."""
    weight = tensors.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
    return weight is not None and weight.dtype == "F8_E4M3"


def _blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    if len(shape) < 2:
        return ()
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _scaled(weight: LazyTensor, scales: LazyTensor, block: tuple[int, int]) -> Any:
    def load() -> np.ndarray:
        m, n = weight.shape[-2:]
        factors = scales.float32().repeat(block[0], axis=-2)[..., :m, :].repeat(block[1], axis=-1)[..., :n]
        return from_float32(weight.float32() * factors, "BF16")

    return load
