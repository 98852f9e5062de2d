"""Finds pointers and references that lack an address space.

Metal requires `device`, `constant`, `thread` or `threadgroup` on each of them (Metal Shading Language
Specification, 4). clang, which compiles the source as C++, accepts `float* p` as well as `device float* p`.
"""

from __future__ import annotations

from .errors import KernelError
from .tokens import Token, is_word, significant, split

_SPACES = {"device", "constant", "thread", "threadgroup"}
_NOT_TYPES = set("return else case delete new throw goto sizeof operator using typedef".split())
_QUALIFIERS = {"const", "volatile", "constexpr", "static", "inline", "struct"}
_TYPE_SCOPES = {"struct", "namespace", "class", "enum"}
_AFTER_LOCAL = {"=", ";", ",", "[", ")", "{", ":"}
_AFTER_PARAMETER = {",", ")", "=", "["}
_BEFORE_BLOCK = {")", ";", "{", "}", "else", "do", "const"} | _SPACES


def lint(source: str, where: str, function_body: bool) -> None:
    """Raise KernelError with the lines that declare a pointer or reference without an address space.

    Args:
        where: the name of the source in the message.
        function_body: the source is the inside of a function, like a kernel's `source` and unlike a header.
    """
    lines = _Walk(significant(split(source)), function_body).unqualified()
    if lines:
        raise KernelError(
            f"{where}: pointer or reference without an address space (device, constant, thread or threadgroup) "
            f"at line {', '.join(map(str, sorted(set(lines))))}"
        )


class _Walk:
    """One pass over the tokens that only keeps track of whether it is inside a function."""

    def __init__(self, tokens: list[Token], function_body: bool) -> None:
        self.text = [token.text for token in tokens]
        self.line = [token.line for token in tokens]
        self.in_function = [function_body]  # one entry per open brace, and the outermost
        self.found: list[int] = []

    def unqualified(self) -> list[int]:
        """The lines of the offending declarations."""
        at, statement_starts = 0, True
        while at < len(self.text):
            if self.text[at] == "#":
                at = self._after_line(at)
                continue
            self._track_scope(at)
            if statement_starts and self.in_function[-1] and self._lacks_space(at, _AFTER_LOCAL):
                self.found.append(self.line[at])
            if self._opens_parameters(at):
                at = self._read_parameters(at)
            statement_starts = self._ends_statement(at)
            at += 1
        return self.found

    def _after_line(self, at: int) -> int:
        """The first token after a preprocessor line."""
        line = self.line[at]
        while at < len(self.text) and self.line[at] == line:
            at += 1
        return at

    def _track_scope(self, at: int) -> None:
        if self.text[at] == "{":
            begin = at
            while begin > 0 and self.text[begin - 1] not in ";{}":
                begin -= 1
            head = self.text[begin:at]
            self.in_function.append(")" in head or not _TYPE_SCOPES.intersection(head))
        elif self.text[at] == "}" and len(self.in_function) > 1:
            self.in_function.pop()

    def _ends_statement(self, at: int) -> bool:
        """Whether a declaration can begin after this token."""
        text, before = self.text[at : at + 1], self.text[at - 1] if at else ""
        if text == ["{"]:
            return before in _BEFORE_BLOCK
        return text in ([";"], ["}"]) or (text == ["("] and before == "for")

    def _opens_parameters(self, at: int) -> bool:
        if self.in_function[-1] or self.text[at] != "(" or at == 0:
            return False
        return is_word(self.text[at - 1]) and self.text[at - 1] != "static_assert"

    def _read_parameters(self, at: int) -> int:
        """Check the parameters of a function; returns the index of the closing bracket."""
        depth, begins = 0, True
        for place in range(at + 1, len(self.text)):
            text = self.text[place]
            if begins and self._lacks_space(place, _AFTER_PARAMETER):
                self.found.append(self.line[place])
            if text in "(<[":
                depth += 1
            elif text in ")>]":
                if depth == 0:
                    return place
                depth -= 1
            begins = text == "," and depth == 0
        return len(self.text)

    def _lacks_space(self, at: int, ends: set[str]) -> bool:
        """Whether `type * name` or `type & name`, followed by one of `ends`, is here without an address space."""
        names = angle = 0
        has_space = indirect = False
        for place in range(at, len(self.text)):
            text = self.text[place]
            if text == "<":
                angle += 1
            elif text == ">" and angle:
                angle -= 1
            elif angle:
                if text in ";{}":
                    return False
            elif text in _SPACES:
                has_space = True
            elif text == "auto" or text in _NOT_TYPES:
                return False
            elif is_word(text):
                if indirect:
                    follows = self.text[place + 1 : place + 2]
                    return not has_space and names >= 1 and bool(ends.intersection(follows))
                names += text not in _QUALIFIERS
            elif text in "*&" and names:
                indirect = True
            elif text != ":":
                return False
        return False
