"""The only two changes made to an author's source before clang or nvcc sees it.

1. `MSL_TGVAR` is put in front of each `threadgroup` that declares a variable. Such a variable is shared by the
   threadgroup (Metal Shading Language Specification, 4.4) and becomes static in C++. A pointer or reference *to*
   threadgroup memory, a parameter, a cast and a template argument stay as they are.
2. A floating-point literal without a suffix gets an `f`, because Metal has no double (ibid., 2.1).
"""

from __future__ import annotations

import re

from .errors import KernelError
from .tokens import Token, is_word, significant, split

_UNSUFFIXED = re.compile(r"(\d+\.\d*|\.\d+)([eE][+-]?\d+)?|\d+[eE][+-]?\d+|0[xX][\da-fA-F.]+[pP][+-]?\d+")
_NUMBER = re.compile(r"\.?\d")


def prepare(source: str, where: str = "source") -> str:
    """The source with both changes, line by line.

    Raises:
        KernelError: if a threadgroup variable has an initialiser, which Metal forbids. `where` names the source.
    """
    pieces = split(source)
    tokens = significant(pieces)
    brackets: list[str] = []
    before = ""
    for place, token in enumerate(tokens):
        text = token.text
        if text in "({[":
            brackets.append(text)
        elif text in ")}]" and brackets:
            brackets.pop()
        elif text == "threadgroup" and brackets[-1:] != ["("] and before != ")":
            if _declares_variable(tokens[place + 1 :], f"{where}:{token.line}"):
                pieces[token.piece] = "MSL_TGVAR threadgroup"
        elif _NUMBER.match(text) and _UNSUFFIXED.fullmatch(text):
            pieces[token.piece] = text + "f"
        before = text
    return "".join(pieces)


def _declares_variable(rest: list[Token], where: str) -> bool:
    """Whether `threadgroup`, followed by these tokens, declares a variable: type, name, then one of ; , [ ="""
    angle = names = 0
    for token in rest:
        text = token.text
        if text == "<":
            angle += 1
        elif text == ">":
            angle -= 1
            if angle < 0:
                return False  # a template argument ended
        elif angle == 0 and text in "*&();=,[{":
            if text in "*&()" or names < 2:
                return False
            if text in "={":
                raise KernelError(f"{where}: a threadgroup variable cannot have an initialiser")
            return True
        elif angle == 0 and is_word(text):
            names += 1
    return False
