"""Proves that a hostile pickle runs nothing, cannot change what is read, and cannot take all memory."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtp_mlx.convert.read.torch_pickle import read_torch
from mtp_mlx.errors import ConversionError
from tests.convert.read.hostile_pickles import hostile
from tests.convert.read.torch_files import Call, Global, Tensor, pickled, write_torch, write_zip


@pytest.mark.parametrize("case", list(hostile("")))
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"
    pickle_bytes, name = hostile(f"touch {marker}")[case]
    path = write_zip(tmp_path / "m.bin", pickle_bytes, {"0": b"\0" * 16})
    with pytest.raises(ConversionError) as caught:
        read_torch(path)
    message = str(caught.value)
    assert (
        f"names {name}, which is not a tensor record" in message and "nothing in it was executed" in message
    )
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
        "from mtp_mlx.convert.read.torch_pickle import read_torch\n"
        "from mtp_mlx.errors import ConversionError\n"
        "try: read_torch(sys.argv[1])\n"
        "except ConversionError as error: print('refused:', error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused:")
    assert "data.pkl is damaged" in done.stdout or "there are no tensors in it" in done.stdout


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
    with pytest.raises(ConversionError, match="contain each other"):
        read_torch(write_zip(tmp_path / "m.pt", loop, {}))
