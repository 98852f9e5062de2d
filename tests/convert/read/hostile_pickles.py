"""Pickles that would run a command where a pickle is simply loaded, each hiding it in another way."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from typing import Any

from tests.convert.read.torch_files import Call, Global, Opcodes, pickled


class Evil:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
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
