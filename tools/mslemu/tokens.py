"""Splits Metal source into tokens; `prepare` and `lint` need no grammar beyond that."""

from __future__ import annotations

import re
from typing import NamedTuple

_TOKEN = re.compile(
    r"""//[^\n]*                    # comment
      | \.?\d(?:[eEpP][+-]|[\w.])*  # number
      | /\*.*?\*/                   # comment
      | "(?:\\.|[^"\\])*"           # string
      | '(?:\\.|[^'\\])*'           # character
      | [A-Za-z_]\w*                # word
      | \s+
      | .                           # any other character by itself
    """,
    re.DOTALL | re.VERBOSE,
)
_WORD = re.compile(r"[A-Za-z_]")


class Token(NamedTuple):
    """A token that is neither white space nor a comment."""

    text: str
    line: int  # from 1
    piece: int  # its index in the list of `split`


def split(source: str) -> list[str]:
    """All tokens, including white space and comments; joined, they give the source again."""
    return _TOKEN.findall(source)


def significant(pieces: list[str]) -> list[Token]:
    """The tokens without white space and comments."""
    found, line = [], 1
    for piece, text in enumerate(pieces):
        if not text.isspace() and not text.startswith(("//", "/*")):
            found.append(Token(text, line, piece))
        line += text.count("\n")
    return found


def is_word(text: str) -> bool:
    """Whether this is a name or keyword."""
    return bool(_WORD.match(text))
