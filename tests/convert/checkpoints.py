"""Writes tiny safetensors checkpoints with plain numpy, independently of the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}


def bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the float32 `values` cut to bfloat16 (exact where the low half is zero)."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str] | None = None
) -> Path:
    """One file; `dtypes` names the type of tensors that numpy has no type for ("BF16", "F8_E4M3")."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, chunks = 0, []
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        dtype = (dtypes or {}).get(name) or TYPES[array.dtype.name]
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + len(data)],
        }
        chunks.append(data)
        position += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))
    return path


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    """A folder of shards with their index; returns the index."""
    for file, tensors in shards.items():
        write_safetensors(folder / file, tensors)
    index = folder / "model.safetensors.index.json"
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index
