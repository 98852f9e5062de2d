"""Proves that tensors of PyTorch files are read exactly and lazily, and damaged files are refused by name."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtp_mlx.convert.read.torch_pickle import TorchFile, read_torch
from mtp_mlx.errors import ConversionError
from tests.convert.read.torch_files import Call, Global, Opcodes, Tensor, pickled, write_torch, write_zip

RANDOM = np.random.default_rng(0)


def values(file: TorchFile, name: str) -> np.ndarray:
    """The tensor's values in float32."""
    return file.tensors[name].float32()


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_each_type_is_read_exactly(tmp_path: Path, dtype: str) -> None:
    array = (RANDOM.normal(size=(3, 5)) * 9).astype(dtype)
    found = read_torch(write_torch(tmp_path / "m.bin", {"w": array})).tensors["w"]
    assert found.shape == (3, 5) and found.load().dtype == array.dtype
    np.testing.assert_array_equal(found.load(), array)


def test_bfloat16_and_fp8(tmp_path: Path) -> None:
    exact = np.array([0.0, -1.5, 448.0, 2.0**-9, 0.40625, -240.0], np.float32)
    bf16 = (exact.view(np.uint32) >> 16).astype(np.uint16)
    fp8 = np.array([0x00, 0xBC, 0x7E, 0x01, 0x2D, 0xF7], np.uint8)  # the same numbers, by hand
    tensors = {"b": Tensor(bf16, dtype="bfloat16"), "f": Tensor(fp8, dtype="float8_e4m3fn")}
    file = read_torch(write_torch(tmp_path / "m.pt", tensors))
    assert (file.tensors["b"].dtype, file.tensors["f"].dtype) == ("BF16", "F8_E4M3")
    np.testing.assert_array_equal(values(file, "b"), exact)
    np.testing.assert_array_equal(values(file, "f"), exact)


def test_strides_offsets_and_shapes(tmp_path: Path) -> None:
    storage = np.arange(24, dtype=np.float32)
    tensors = {
        "transposed": Tensor(storage, (4, 6), (1, 4)),
        "column": Tensor(storage, (4,), (6,), offset=2),
        "expanded": Tensor(storage, (3, 2), (0, 1), offset=5),
        "scalar": Tensor(storage, (), (), offset=7),
        "empty": Tensor(storage[:0], (0, 3), (3, 1)),
        "parameter": Tensor(storage, (2, 12), parameter=True),
    }
    file = read_torch(write_torch(tmp_path / "m.pth", tensors))
    np.testing.assert_array_equal(values(file, "transposed"), storage.reshape(6, 4).T)
    np.testing.assert_array_equal(values(file, "column"), [2, 8, 14, 20])
    np.testing.assert_array_equal(values(file, "expanded"), [[5, 6]] * 3)
    assert values(file, "scalar").shape == () and values(file, "scalar") == 7
    assert values(file, "empty").shape == (0, 3)
    np.testing.assert_array_equal(values(file, "parameter"), storage.reshape(2, 12))


def test_numbers_are_read_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_torch(tmp_path / "m.bin", {"a": np.ones(4, np.float32), "b": np.zeros(4, np.float32)})
    maps: list[Any] = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *a, **k: maps.append(a) or memmap(*a, **k))
    file = read_torch(path)
    assert not maps
    file.tensors["a"].load()
    assert len(maps) == 1


def test_a_lightning_file(tmp_path: Path) -> None:
    weight = RANDOM.normal(size=(2, 3)).astype(np.float32)
    content = {
        "state_dict": OrderedDict({"model.w": weight, "model.steps": np.array([7])}),
        "optimizer_states": [{"state": {}, "lr": 0.1}],
        "hyper_parameters": {"dims": [1, 2], "name": "x", "rate": 1e-3, "none": None, "on": True},
        "size": Call("torch", "Size", ((2, 3),)),
        "names": Call("builtins", "set", (["a", "b"],)),
        "kind": Global("torch", "float32"),
        "epoch": 3,
    }
    file = read_torch(write_torch(tmp_path / "last.ckpt", content))
    assert file.tensors.keys() == {"model.w", "model.steps"}
    np.testing.assert_array_equal(values(file, "model.w"), weight)
    assert file.values["hyper_parameters"] == content["hyper_parameters"]
    assert (file.values["epoch"], file.values["size"], file.values["names"]) == (3, (2, 3), {"a", "b"})


def test_nested_dictionaries_have_dotted_names(tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    file = read_torch(write_torch(tmp_path / "m.pt", {"model": {"a": one, "block": {"b": one}}, "c": one}))
    assert file.tensors.keys() == {"model.a", "model.block.b", "c"}


def test_a_state_dict_with_metadata(tmp_path: Path) -> None:
    """torch.save(module.state_dict()) sets `_metadata` on the dictionary with the BUILD opcode."""
    metadata = pickled({"_metadata": OrderedDict({"": {"version": 1}})})[2:-1]
    tensors = pickled(OrderedDict(lr=0.5))[2:-1]
    path = write_zip(tmp_path / "m.pt", b"\x80\x02" + tensors + metadata + b"b.", {})
    with pytest.raises(ConversionError, match="there are no tensors in it"):  # it is read to its end
        read_torch(path)


# --- tensors that do not fit their storage -----------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(np.ones(4, np.float32), (5,), (1,)),
        Tensor(np.ones(4, np.float32), (2, 2), (4, 1)),
        Tensor(np.ones(4, np.float32), (4,), (1,), offset=1),
        Tensor(np.ones(4, np.float32), (2**40,), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path, tensor: Tensor) -> None:
    with pytest.raises(ConversionError, match=r"needs .* bytes of the storage 'data/0', which has 16"):
        read_torch(write_torch(tmp_path / "m.pt", {"w": tensor}))


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(np.ones(4, np.float32), (2,), (-1,)),
        Tensor(np.ones(4, np.float32), (-2,), (1,)),
        Tensor(np.ones(4, np.float32), (2, 2), (1,)),
        Tensor(np.ones(4, np.float32), (2,), (1,), offset=-1),
    ],
)
def test_negative_sizes_are_refused(tmp_path: Path, tensor: Tensor) -> None:
    with pytest.raises(ConversionError, match="damaged"):
        read_torch(write_torch(tmp_path / "m.pt", {"w": tensor}))


def test_a_storage_is_not_repeated_without_end(tmp_path: Path) -> None:
    """16 bytes that claim to be 40 GB are refused before anyone reads them; a small buffer may repeat."""
    few = Tensor(np.arange(4, dtype=np.float32), (3, 4), (0, 1))
    found = read_torch(write_torch(tmp_path / "few.pt", {"w": few}))
    np.testing.assert_array_equal(values(found, "w"), np.tile(np.arange(4), (3, 1)))
    many = Tensor(np.ones(4, np.float32), (10**10,), (0,))
    with pytest.raises(
        ConversionError, match=r"repeats the 16 bytes of the storage 'data/0' to 40,000,000,000"
    ):
        read_torch(write_torch(tmp_path / "many.pt", {"w": many}))


NAMES = {
    "a number of 4,800 digits": (
        b"\x8b" + (2000).to_bytes(4, "little") + b"\x7f" * 2000,
        "text nor a number",
    ),
    "a tuple": (b"K\x01\x85", "text nor a number"),
    "an order to the terminal": (b"X\x05\x00\x00\x00\x1b[2Jw", r"a tensor is called '\\x1b\[2Jw'"),
    "two lines": (b"X\x03\x00\x00\x00a\nb", r"a tensor is called 'a\\nb'"),
    "half a character": (b"X\x03\x00\x00\x00\xed\xa0\x80", r"a tensor is called '\\ud800'"),
    "a long text": (b"X" + (2000).to_bytes(4, "little") + b"k" * 2000, "more than 1000 characters"),
}


@pytest.mark.parametrize("kind", list(NAMES))
def test_names_that_are_none(tmp_path: Path, kind: str) -> None:
    key, message = NAMES[kind]
    path = write_torch(tmp_path / "m.pt", {Opcodes(key): np.ones(1, np.float32)})
    with pytest.raises(ConversionError, match=message):
        read_torch(path)


def test_one_long_key_at_every_level(tmp_path: Path) -> None:
    """Names of dictionaries in dictionaries add up, and the sum counts: a small file has no gigabytes of names."""
    content: Any = {"w": np.ones(1, np.float32)}
    for _ in range(20):
        content = {"k" * 90: content}
    with pytest.raises(ConversionError, match="more than 1000 characters"):
        read_torch(write_torch(tmp_path / "m.pt", content))


# --- files that are not whole, or of another kind -----------------------------------------------------------


def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = write_torch(tmp_path / "m.pt", {"w": np.ones((64, 64), np.float32)}).read_bytes()
    cut = tmp_path / "cut.pt"
    for n_bytes in (0, 3, 4, 50, 700, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        cut.write_bytes(whole[:n_bytes])
        with pytest.raises(ConversionError, match="truncated or damaged|not a PyTorch file"):
            read_torch(cut)


OTHER_FORMATS = [
    (pickle.dumps({"w": 1}, 2), "a bare pickle, PyTorch's format before 1.6"),
    (b"\0" * 257 + b"ustar" + b"\0" * 250, r"PyTorch's tar format"),
    (b"GGUF" + b"\0" * 100, "not a PyTorch file"),
]


@pytest.mark.parametrize(("content", "message"), OTHER_FORMATS)
def test_other_formats_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        read_torch(tmp_path / "m.bin")


def test_odd_archives(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    missing = pickled({"w": Tensor(np.ones(1, np.float32))})
    with pytest.raises(ConversionError, match="storage 'data/0' is missing"):
        read_torch(write_zip(path, missing, {}))
    with pytest.raises(ConversionError, match="big-endian"):
        read_torch(write_zip(path, missing, {"0": b"\0" * 4}, byteorder=b"big"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", missing)
    with pytest.raises(ConversionError, match="is compressed"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(ConversionError, match="0 data.pkl records"):
        read_torch(path)
    for value, message in (
        ([1], "contains a list"),
        ({"a": 1}, "no tensors"),
        ({"state_dict": 3}, "not a dictionary"),
    ):
        with pytest.raises(ConversionError, match=message):
            read_torch(write_torch(path, value))
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "none.pt")


def test_what_torch_itself_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.randn(3, 4)
    module = torch.nn.Linear(4, 3)
    content = {"w": weight, "t": weight.t(), "b": weight.bfloat16(), "p": module.weight}
    torch.save(content, tmp_path / "m.pt")
    file = read_torch(tmp_path / "m.pt")
    for name, tensor in content.items():
        np.testing.assert_array_equal(values(file, name), tensor.detach().float().numpy())
    torch.save(module.state_dict(), tmp_path / "s.pt")
    assert read_torch(tmp_path / "s.pt").tensors.keys() == {"weight", "bias"}
