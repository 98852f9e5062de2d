"""Reads the tensors of a PyTorch file (.bin, .pt, .pth, Lightning's .ckpt) without torch and without running code.

A pickle is a program: it names functions and calls them. Here every name is looked up in the short table below, whose
entries only describe tensors; any other name is refused before anything is called. Tensors stay on disk until they
are read. `torch_archive` reads the container, `torch_opcodes` runs the pickle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mtp_mlx.convert.read.lazy_tensor import STORED_AS, LazyTensor
from mtp_mlx.convert.read.torch_archive import SAVE_AGAIN, Storage, open_archive
from mtp_mlx.convert.read.torch_opcodes import Damaged, Machine, Record, scalars
from mtp_mlx.errors import ConversionError

# torch's name of a type, of its storage class -> ours.
_DTYPES = {
    "float64": "F64",
    "double": "F64",
    "float32": "F32",
    "float": "F32",
    "float16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int64": "I64",
    "long": "I64",
    "int32": "I32",
    "int": "I32",
    "int16": "I16",
    "short": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_MAX_DEPTH = 100
_MAX_DIMENSIONS = 64
_MAX_SIZE = 2**62
_MAX_MEMBERS = 1_000_000
_MAX_NAME = 1000  # characters of a tensor's name
# A tensor may repeat the numbers of its storage (stride 0), as some buffers do, up to this many bytes.
_MAX_REPEATED = 1 << 26


@dataclass
class TorchFile:
    """What a PyTorch file holds.

    Attributes:
        tensors: by name; of a Lightning file or a training checkpoint those of its `state_dict`.
        values: plain values beside the tensors at the top level, such as `hyper_parameters`.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def read_torch(path: str | Path) -> TorchFile:
    """Read the descriptions of all tensors in `path`; each tensor's numbers are read on demand.

    Raises FileNotFoundError, or ConversionError: not PyTorch's zip format, damaged, truncated, or a pickle that names
    anything but tensor records (the message has the name; nothing was executed).
    """
    path = Path(path)
    storages, pickled = open_archive(path)
    try:
        records = _Records(path, storages)
        root = Machine(records.find, records.storage).run(pickled)
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise ConversionError(
            f"{path}: its data.pkl is damaged ({type(error).__name__}: {error}); get the file again"
        ) from error
    return _contents(path, root)


# --- the pickle ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TypedStorage:
    """A storage as the pickle describes it: its bytes, and the type of its elements (None: bytes)."""

    where: Storage
    key: str
    dtype: str | None


class _Records:
    """The names that a pickle of tensors may use, and what they stand for."""

    def __init__(self, path: Path, storages: dict[str, Storage]) -> None:
        self._path = path
        self._storages = storages
        self._copied = 0
        self._table = self._allowed()

    def _allowed(self) -> dict[str, Record]:
        table = {
            "torch._utils._rebuild_tensor_v2": Record(self._tensor_v2),
            "torch._utils._rebuild_tensor_v3": Record(self._tensor_v3),
            "torch._utils._rebuild_parameter": Record(lambda tensor, *_: tensor),
            "torch.Size": Record(_whole_numbers),
            "torch.storage.UntypedStorage": Record(),
            "collections.OrderedDict": Record(lambda: {}),  # its items follow one by one
        }
        for module in ("builtins", "__builtin__"):
            table[f"{module}.set"] = Record(lambda values=(): set(self._members(values)))
            table[f"{module}.frozenset"] = Record(lambda values=(): frozenset(self._members(values)))
            table[f"{module}.complex"] = Record(complex)
        return table | {f"torch.{name}": Record(dtype=dtype) for name, dtype in (_STORAGES | _DTYPES).items()}

    def find(self, module: str, name: str) -> Record:
        """What `module.name` stands for; raises ConversionError for a name that is not in the table."""
        found = self._table.get(f"{module}.{name}")
        if found is None:
            raise ConversionError(
                f"{self._path}: its pickle names {module}.{name}, which is not a tensor record, so the file is "
                f"refused and nothing in it was executed; {SAVE_AGAIN}"
            )
        return found

    def _members(self, values: Any) -> list[Any]:
        """The members of a set; counted, because a pickle can copy one long list any number of times."""
        members = scalars(values)
        self._copied += len(members)
        if self._copied > _MAX_MEMBERS:
            raise Damaged(f"sets with more than {_MAX_MEMBERS:,} members")
        return members

    def storage(self, pid: Any) -> _TypedStorage:
        """The storage that ("storage", type, key, device, number of elements) names."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[2], str)):
            raise Damaged("a storage is not described as torch describes it")
        _, kind, key, _, _ = pid
        where = self._storages.get(key)
        if where is None:
            raise ConversionError(f"{self._path}: the storage 'data/{key}' is missing; get the file again")
        if not isinstance(kind, Record):
            raise Damaged("a storage of no known type")
        return _TypedStorage(where, key, kind.dtype)

    def _tensor_v2(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> LazyTensor:
        if not isinstance(storage, _TypedStorage) or storage.dtype is None:
            raise Damaged("a tensor without a typed storage")
        return self._tensor(storage, storage.dtype, offset, size, stride)

    def _tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
    ) -> LazyTensor:
        if not isinstance(storage, _TypedStorage) or not isinstance(dtype, Record) or dtype.dtype is None:
            raise Damaged("a tensor without a storage or a type")
        return self._tensor(storage, dtype.dtype, offset, size, stride)

    def _tensor(self, storage: _TypedStorage, dtype: str, offset: Any, size: Any, stride: Any) -> LazyTensor:
        shape, strides = _whole_numbers(size), _whole_numbers(stride)
        if len(shape) != len(strides) or not isinstance(offset, int) or offset < 0:
            raise Damaged("a tensor whose size, stride and offset do not fit together")
        itemsize = np.dtype(STORED_AS[dtype]).itemsize
        empty = 0 in shape
        # The elements used are offset .. offset + reach - 1; they must lie within the storage.
        reach = 0 if empty else 1 + sum((n - 1) * step for n, step in zip(shape, strides))
        if (offset + reach) * itemsize > storage.where.n_bytes:
            raise ConversionError(
                f"{self._path}: a tensor of shape {list(shape)} needs {(offset + reach) * itemsize:,} bytes of the "
                f"storage 'data/{storage.key}', which has {storage.where.n_bytes:,}; get the file again"
            )
        n_bytes = math.prod(shape) * itemsize
        if n_bytes > max(storage.where.n_bytes, _MAX_REPEATED):
            raise ConversionError(
                f"{self._path}: a tensor of shape {list(shape)} repeats the {storage.where.n_bytes:,} bytes of the "
                f"storage 'data/{storage.key}' to {n_bytes:,}; {SAVE_AGAIN}"
            )
        start = storage.where.offset + offset * itemsize
        return LazyTensor(dtype, shape, lambda: _read(self._path, dtype, start, reach, shape, strides))


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if (
        not isinstance(values, (tuple, list))
        or len(values) > _MAX_DIMENSIONS
        or not all(isinstance(n, int) and 0 <= n <= _MAX_SIZE for n in values)
    ):
        raise Damaged("a tensor's size or stride does not consist of whole numbers")
    return tuple(values)


def _read(
    path: Path, dtype: str, start: int, reach: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    """The tensor's elements; `strides` are counted in elements."""
    kind = np.dtype(STORED_AS[dtype])
    if reach == 0:
        return np.zeros(shape, kind)
    flat = np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(reach * kind.itemsize,)).view(kind)
    view = np.lib.stride_tricks.as_strided(
        flat, shape, [step * kind.itemsize for step in strides], writeable=False
    )
    return np.ascontiguousarray(view).reshape(shape)


# --- what is in it ------------------------------------------------------------------------------------------


def _contents(path: Path, root: Any) -> TorchFile:
    """The tensors and plain values among the unpickled objects."""
    if not isinstance(root, dict):
        raise ConversionError(
            f"{path}: contains a {type(root).__name__}, not a dictionary of tensors; {SAVE_AGAIN}"
        )
    found = TorchFile()
    weights = root.get("state_dict", root)
    if not isinstance(weights, dict):
        raise ConversionError(f"{path}: its 'state_dict' is not a dictionary; {SAVE_AGAIN}")
    for name, tensor in _tensors(path, weights, "", set()):
        if name in found.tensors:
            raise ConversionError(f"{path}: two tensors are both called '{name}'; {SAVE_AGAIN}")
        found.tensors[name] = tensor
    for key, value in root.items():
        if value is not weights and isinstance(key, str) and _is_plain(value):
            found.values[key] = value
    if not found.tensors:
        raise ConversionError(f"{path}: there are no tensors in it; is it the right file?")
    return found


def _tensors(
    path: Path, mapping: dict[Any, Any], prefix: str, seen: set[int]
) -> Iterator[tuple[str, LazyTensor]]:
    """(name, tensor) of a dictionary and of those nested in it, whose names are joined by dots.

    `seen` has the ids of the dictionaries met so far: one that contains itself would have no end.
    """
    if id(mapping) in seen or prefix.count(".") > _MAX_DEPTH:
        raise ConversionError(f"{path}: its dictionaries contain each other ('{prefix}'); {SAVE_AGAIN}")
    seen.add(id(mapping))
    for key, value in mapping.items():
        if not isinstance(value, (LazyTensor, dict)):
            continue
        # A few bytes can repeat one long key, and numbers can have more digits than Python will print.
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) <= _MAX_SIZE):
            raise ConversionError(f"{path}: the name of a tensor is neither text nor a number; {SAVE_AGAIN}")
        name = f"{prefix}{key}"
        if len(name) > _MAX_NAME:
            raise ConversionError(
                f"{path}: a tensor's name has more than {_MAX_NAME} characters; {SAVE_AGAIN}"
            )
        if not name.isprintable():  # printed, it could control the terminal
            raise ConversionError(f"{path}: a tensor is called {ascii(name)}; {SAVE_AGAIN}")
        if isinstance(value, LazyTensor):
            yield name, value
        else:
            yield from _tensors(path, value, f"{name}.", seen)


def _is_plain(value: Any) -> bool:
    """Whether `value` consists of text, numbers and containers of these."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, (dict, list, tuple, set, frozenset)):
            if id(item) not in seen:
                seen.add(id(item))
                waiting += [*item.keys(), *item.values()] if isinstance(item, dict) else item
        elif not (item is None or isinstance(item, (str, bytes, bool, int, float, complex))):
            return False
    return True
