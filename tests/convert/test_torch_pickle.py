"""Proves that tensors of PyTorch files are read exactly and lazily, and that a hostile pickle runs nothing."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtp_mlx.convert.torch_pickle import TorchFile, read_torch
from mtp_mlx.errors import ConversionError

from .torch_files import Call, Global, Opcodes, Tensor, pickled, write_torch, write_zip

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
    with pytest.raises(ConversionError, match="holds no tensors"):  # it is read to its end
        read_torch(path)


# --- hostile files ------------------------------------------------------------------------------------------


class Evil:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def hostile(command: str) -> dict[str, tuple[bytes, str]]:
    """Pickles that would run `command` where a pickle is simply loaded -> the name that must be refused."""
    call = Call("os", "system", (command,))
    text = command.encode()
    unicode = b"\x8c" + bytes([len(text)]) + text
    module, name = b"\x8c\x05posix\x94", b"\x8c\x06system\x94"  # remembered as memo 0 and 1, then dropped
    return {
        "os.system": (pickled(call), "os.system"),
        "in a list": (pickled({"a": [1, [2, call]]}), "os.system"),
        "in a state_dict": (pickled({"state_dict": OrderedDict(w=call)}), "os.system"),
        "as a key": (pickled(OrderedDict(a=Opcodes(pickled({1: call})[2:-1]))), "os.system"),
        "in hyper_parameters": (pickled({"state_dict": {}, "hyper_parameters": {"f": call}}), "os.system"),
        "as a hook of a tensor": (
            pickled({"w": Call("torch._utils", "_rebuild_parameter", (call,))}),
            "os.system",
        ),
        "only named": (pickled({"f": Global("builtins", "eval")}), "builtins.eval"),
        "reduce, protocol 2": (pickle.dumps({"w": [Evil(command)]}, 2), "posix.system"),
        "reduce, protocol 4": (pickle.dumps({"w": [Evil(command)]}, 4), "posix.system"),
        "stack global through memo": (
            b"\x80\x04" + module + b"0" + name + b"0" + b"h\x00h\x01\x93" + unicode + b"\x85R.",
            "posix.system",
        ),
        "inst": (b"(S'" + text + b"'\nios\nsystem\n.", "os.system"),
        "obj": (b"(cos\nsystem\n" + unicode + b"o.", "os.system"),
        "newobj": (b"\x80\x02csubprocess\nPopen\n" + unicode + b"\x85\x81.", "subprocess.Popen"),
        "attribute of an allowed name": (
            b"\x80\x04\x8c\x0bcollections\x8c\x16OrderedDict.fromkeys.x\x93.",
            "collections.OrderedDict.fromkeys.x",
        ),
        "an import that runs": (pickled(Global("this", "x")), "this.x"),
        "torch's own loader": (pickled(Call("torch", "load", ("x",))), "torch.load"),
        "a bound method": (pickled(Call("builtins", "getattr", (1, "real"))), "builtins.getattr"),
    }


@pytest.mark.parametrize("case", list(hostile("")))
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"
    pickle_bytes, name = hostile(f"touch {marker}")[case]
    path = write_zip(tmp_path / "m.bin", pickle_bytes, {"0": b"\0" * 16})
    with pytest.raises(ConversionError) as caught:
        read_torch(path)
    message = str(caught.value)
    assert f"names {name}, which is no tensor record" in message and "nothing of it was executed" in message
    assert not marker.exists()
    assert capfd.readouterr().out == "" and len(message.splitlines()) == 1


def test_the_hostile_pickles_are_live(tmp_path: Path) -> None:
    """The test above proves nothing unless an ordinary unpickler does run the command."""
    for number, case in enumerate(
        ("os.system", "reduce, protocol 4", "stack global through memo", "inst", "obj")
    ):
        marker = tmp_path / str(number)
        pickle.loads(hostile(f"touch {marker}")[case][0])
        assert marker.exists(), case


def changed(opcodes: bytes) -> bytes:
    """A pickle that holds one tensor, with `opcodes` run on it before it is used."""
    tensor = write_only(Tensor(np.ones(4, np.float32)))
    return b"\x80\x02}X\x01\x00\x00\x00w" + tensor + opcodes + b"s."


def write_only(value: Any) -> bytes:
    """The opcodes that leave `value` on the stack."""
    return pickled(value)[2:-1]


LOAD = write_only({"load": Global("collections", "OrderedDict")})


@pytest.mark.parametrize(
    "pickle_bytes",
    [
        changed(LOAD + b"b"),  # BUILD sets the tensor's attributes
        changed(b"N" + LOAD + b"\x86b"),  # BUILD with slots
        b"\x80\x02" + write_only(Global("torch._utils", "_rebuild_parameter")) + LOAD + b"b.",
        b"\x80\x02" + write_only(Global("collections", "OrderedDict")) + LOAD + b"b.",
        b"\x80\x02" + write_only(Global("torch", "FloatStorage")) + b")\x81.",  # NEWOBJ
        pickled({"w": Call("torch", "float32", (1,))}),
        b"\x80\x02\x82\x01.",  # EXT1: an extension code
        b"\x80\x02X\x03\x00\x00\x00abcQ.",  # a storage that is only a text
        b"\x80\x02" + write_only((("storage", "f", "0", "cpu", 1),)) + b"Q.",
        b"",
        b"\x80\x02}",
        b"\x80\x63.",
    ],
)
def test_a_pickle_that_changes_or_misuses_records_is_damaged(tmp_path: Path, pickle_bytes: bytes) -> None:
    path = write_zip(tmp_path / "m.pt", pickle_bytes, {"0": b"\0" * 16})
    with pytest.raises(ConversionError, match=r"its data.pkl is damaged"):
        read_torch(path)


def test_attributes_of_a_dictionary_are_ignored(tmp_path: Path) -> None:
    shadow = write_only({"items": Global("torch", "Size"), "get": Global("torch", "Size")})
    body = write_only(OrderedDict(w=Tensor(np.ones(4, np.float32)))) + shadow + b"b."
    file = read_torch(
        write_zip(tmp_path / "m.pt", b"\x80\x02" + body, {"0": np.ones(4, np.float32).tobytes()})
    )
    assert file.tensors.keys() == {"w"} and type(file.values) is dict


LONG_LIST = write_only(list(range(1000)))
BOMBS = {
    "a memo of two thousand million entries": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a text longer than the file": b"\x80\x04\x8d\xff\xff\xff\xff\x00\x00\x00\x00x.",
    "one list copied into many sets": b"\x80\x02"
    + LONG_LIST
    + b"q\x00]("
    + b"cbuiltins\nset\nh\x00\x85R" * 1100
    + b"e.",
    "one list copied into many sizes": b"\x80\x02"
    + LONG_LIST
    + b"q\x00]("
    + b"ctorch\nSize\nh\x00\x85R" * 9
    + b"e.",
    "a key nested two hundred thousand deep": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "a value nested two hundred thousand deep": b"\x80\x02}X\x01\x00\x00\x00a)" + b"\x85" * 200_000 + b"s.",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited this way on Linux only")
@pytest.mark.parametrize("name", list(BOMBS))
def test_a_small_file_cannot_take_all_memory(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "m.pt", BOMBS[name], {})
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "from mtp_mlx.convert.torch_pickle import read_torch\n"
        "from mtp_mlx.errors import ConversionError\n"
        "try: read_torch(sys.argv[1])\n"
        "except ConversionError as error: print('refused:', error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused:")
    assert "data.pkl is damaged" in done.stdout or "holds no tensors" in done.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pickletools, for odd escapes in texts
def test_any_change_of_a_file_is_read_or_refused(tmp_path: Path) -> None:
    """Thousands of random changes: never another error than ConversionError."""
    content = OrderedDict(a=Tensor(np.ones(12, np.float32), (3, 4)), b=Tensor(np.zeros(4), parameter=True))
    path = write_torch(
        tmp_path / "m.pt", {"state_dict": content, "hyper_parameters": {"x": [1, 2.5, ("y",)]}}
    )
    whole, random = path.read_bytes(), np.random.default_rng(4)
    start = whole.index(b"\x80\x02")
    outcomes = {True: 0, False: 0}
    for number in range(3000):
        changed = bytearray(whole)
        first, last = (start, start + 700) if number % 2 else (0, len(whole))  # the pickle, or anything
        for position in random.integers(first, last, 1 + number % 3):
            changed[position] = random.integers(256)
        path.write_bytes(changed)
        try:
            tensors = read_torch(path).tensors.values()
            [tensor.load() for tensor in tensors if np.prod(tensor.shape) < 1e6]
            outcomes[True] += 1
        except ConversionError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 50


def test_dictionaries_without_end(tmp_path: Path) -> None:
    loop = b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."
    with pytest.raises(ConversionError, match="hold each other"):
        read_torch(write_zip(tmp_path / "m.pt", loop, {}))


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
        ([1], "holds a list"),
        ({"a": 1}, "no tensors"),
        ({"state_dict": 3}, "no dictionary"),
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
