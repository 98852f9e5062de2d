"""Runs a pickle safely: builds plain containers and the records that the caller allows, and nothing else.

Python's own unpickler imports and calls whatever the pickle names, sets any attribute, and can be made to reserve
gigabytes by a few bytes. Here opcodes only move values between a stack and a memo. A name becomes what `find` returns
for it, and only a `Record` can be called. Memory is bounded by the file's size.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Opcodes that put a number or a text on the stack.
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_SCALARS = (str, bytes, bool, int, float, complex, type(None))


class Damaged(ValueError):
    """The pickle does something that a pickle of tensors never does."""


@dataclass(frozen=True)
class Record:
    """What a name that a pickle may use stands for: a function to call (None: not callable), or a number type."""

    call: Callable[..., Any] | None = None
    dtype: str | None = None


class Machine:
    """Runs one pickle.

    Args:
        find: (module, name) -> what that name stands for, or raises.
        load: a persistent id -> the value it stands for.
    """

    def __init__(self, find: Callable[[str, str], Any], load: Callable[[Any], Any]) -> None:
        self._find = find
        self._load = load
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """The object that `pickled` describes.

        Raises Damaged, ValueError or IndexError: not a pickle, or one that does more than describe data; and whatever
        `find` and `load` raise.
        """
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name in _VALUES:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name])
            elif opcode.name not in ("PROTO", "FRAME"):
                self._step(opcode.name, argument)
        raise Damaged("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        for family in (self._names, self._memory, self._containers):
            if family(name, argument):
                return
        raise Damaged(f"it uses the opcode {name}")

    # Each of these three runs the opcodes of one kind and returns whether `name` was one of them.

    def _names(self, name: str, argument: Any) -> bool:
        stack = self._stack
        if name in ("GLOBAL", "INST"):
            stack.append(self._find(*argument.split(" ", 1)))
            if name == "INST":
                raise Damaged("it makes an object of a class")
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise Damaged("a name in it is not text")
            stack.append(self._find(module, attribute))
        elif name == "REDUCE":
            arguments, record = stack.pop(), stack.pop()
            if not isinstance(record, Record) or record.call is None or not isinstance(arguments, tuple):
                raise Damaged("it calls something that cannot be called")
            stack.append(record.call(*arguments))
        elif name == "BINPERSID":
            stack.append(self._load(stack.pop()))
        elif name == "BUILD":  # only dictionaries have attributes (torch's _metadata), which are not tensors
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise Damaged("it changes a value's attributes")
        else:
            return False
        return True

    def _memory(self, name: str, argument: Any) -> bool:
        stack = self._stack
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            return False
        return True

    def _containers(self, name: str, argument: Any) -> bool:
        stack = self._stack
        if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise Damaged("a tuple of more values than there are")
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "LIST", "FROZENSET", "DICT"):
            stack.append(_NEW[name](self._since_mark()))
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}[name]())
        elif name in ("APPEND", "APPENDS"):
            self._extend(list, [stack.pop()] if name == "APPEND" else self._since_mark())
        elif name in ("SETITEM", "SETITEMS"):
            values = self._since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self._extend(dict, values)
        elif name == "ADDITEMS":
            self._extend(set, self._since_mark())
        else:
            return False
        return True

    def _since_mark(self) -> list[Any]:
        """Takes the values above the last mark off the stack."""
        height = self._marks.pop()
        if height > len(self._stack):
            raise Damaged("a mark above the stack")
        values = self._stack[height:]
        del self._stack[height:]
        return values

    def _extend(self, kind: type, values: list[Any]) -> None:
        """Adds `values` to the container on top of the stack."""
        container: Any = self._stack[-1]
        fits = type(container) is kind
        if not fits:
            raise Damaged(f"it adds items to something that is not a {kind.__name__}")
        if kind is list:
            container.extend(values)
        else:
            container.update(_pairs(values) if kind is dict else scalars(values))


def scalars(values: Any) -> list[Any]:
    """`values` as keys or members of a set; raises Damaged unless each is a number, text, or a tuple of these.

    Hashing a tuple nested a million deep would crash the interpreter.
    """
    values = list(values)
    for value in values:
        if not all(isinstance(item, _SCALARS) for item in (value if isinstance(value, tuple) else (value,))):
            raise Damaged("a key that is neither a number nor text")
    return values


def _pairs(values: list[Any]) -> dict[Any, Any]:
    if len(values) % 2:
        raise Damaged("a key without a value")
    return dict(zip(scalars(values[::2]), values[1::2]))


_NEW: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "FROZENSET": lambda values: frozenset(scalars(values)),
    "DICT": _pairs,
}
