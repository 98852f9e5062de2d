"""A GGUF model in one file, or in the parts that llama.cpp's `gguf-split` writes: NAME-00001-of-00003.gguf and so on.

The first part holds the metadata; tensors lie in all of them. `split.no` counts from 0, file names from 1.
"""

from __future__ import annotations

import re
from pathlib import Path

from mtp_mlx.convert.gguf.file import HOW_TO_MEND, GGUFFile, read_file
from mtp_mlx.errors import ConversionError

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE | re.DOTALL)


def read_gguf(path: str | Path) -> GGUFFile:
    """Read the headers of the GGUF model at `path`: of one file, or of all parts if it is the first one.

    Raises FileNotFoundError, or ConversionError: not a GGUF file, damaged or truncated; a part of a model that is not
    the first one, or whose other parts are missing or do not belong to it.
    """
    gguf = read_file(Path(path))
    number, count = _place(gguf)
    if count < 2:
        return gguf
    this = f"{gguf.path}: this is part {number} of {count} of a model that was split into several files"
    if number != 1:
        raise ConversionError(f"{this}: give the first part, {_names(gguf, count)[0]}.")
    files = _names(gguf, count)
    if gguf.path.name != files[0]:
        raise ConversionError(
            f"{this}, but its name does not end in -00001-of-{count:05}.gguf, by which the others are found: give "
            "all parts their names back."
        )
    missing = [name for name in files if not (gguf.path.parent / name).is_file()]
    if missing:
        raise ConversionError(
            f"{this}, {len(missing)} of which {'is' if len(missing) == 1 else 'are'} missing beside it: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}. Get all parts."
        )
    for place, name in enumerate(files[1:], 2):
        _join(gguf, read_file(gguf.path.parent / name), (place, count))
    total = gguf.metadata.get("split.tensors.count", len(gguf.tensors))
    if total != len(gguf.tensors):
        raise ConversionError(
            f"{gguf.path}: its {count} parts hold {len(gguf.tensors)} tensors, the metadata say {total!r}; one part "
            "belongs to another model. Get all parts again."
        )
    return gguf


def _join(gguf: GGUFFile, part: GGUFFile, place: tuple[int, int]) -> None:
    """Adds the tensors of a later part, which must be the one that its name says."""
    if _place(part) != place:
        raise ConversionError(
            f"{part.path}: its name says part {place[0]} of {place[1]}, its metadata say part {_place(part)[0]} of "
            f"{_place(part)[1]}. Get all parts again."
        )
    twice = gguf.tensors.keys() & part.tensors.keys()
    if twice:
        raise ConversionError(
            f"{part.path}: the tensor {min(twice)!r} is in another part too. Get all parts again."
        )
    gguf.tensors |= part.tensors
    gguf.files.append(part.path)


def _place(gguf: GGUFFile) -> tuple[int, int]:
    """(number of this part, counted from 1; number of parts); (1, 1) for a model in one file."""
    number, count = gguf.metadata.get("split.no", 0), gguf.metadata.get("split.count", 1)
    if not all(type(value) is int for value in (number, count)) or not 0 <= number < max(count, 1) <= 99999:
        raise ConversionError(
            f"{gguf.path}: it says that it is part split.no = {number!r}, counted from 0, of split.count = {count!r} "
            f"parts. {HOW_TO_MEND}"
        )
    return number + 1, max(count, 1)


def _names(gguf: GGUFFile, count: int) -> list[str]:
    """File names of all parts, from the name of one of them."""
    match = _NAME.fullmatch(gguf.path.name)
    stem, suffix = (match[1], match[4]) if match else (gguf.path.stem, ".gguf")
    return [f"{stem}-{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1)]
