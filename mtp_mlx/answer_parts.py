"""Tells thinking, answer and tool calls apart while a text is written.

The tags are the tokenizer's own (`think_start`, `tool_call_start`, ...), and tool calls are read by mlx-lm's parser
for the model (`mlx_lm.tool_parsers`). Text that may still become a tag is held back; nothing is lost: a tool call
that cannot be read comes out as text, tags included, and is counted.

States, named as in mlx-lm: "normal" (the answer), "reasoning" (thinking), "tool"; some formats have further states,
in which text is dropped.
"""

from __future__ import annotations

import json
import secrets
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mtp_mlx.token_ids import text_of

LONGEST_TAG = 16  # tokens
Transitions = dict[str, list[tuple[str, str]]]

UNREAD_CALL = "a tool call could not be read and is part of the text"
FURTHER_CALL = "a further tool call was left out, since the request allows only one"
_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # Mistral's chat templates refuse ids of any other form


@dataclass(frozen=True)
class ToolCall:
    """A tool call of the model.

    Attributes:
        id: the model's own, or a new one.
        name: of the tool, as the model wrote it.
        arguments: a JSON object.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Parts:
    """What a piece of text adds to thinking and answer, and the tool calls that it completes."""

    text: str = ""
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class PartsSettings:
    """How to read a text.

    Attributes:
        start: state in which it starts; "reasoning" if the prompt ends with the opening tag.
        tools: tools that the model may call, in OpenAI's form; None to leave tool calls in the text.
        parallel: whether it may call more than one.
    """

    start: str = "normal"
    tools: tuple[dict[str, Any], ...] | None = None
    parallel: bool = True


@dataclass(frozen=True)
class Run:
    """A stretch of text in one state; `marker` if it is the tag that led to this state or out of the one before."""

    state: str
    text: str
    marker: bool = False


def transitions_of(tokenizer: Any, tools: bool) -> Transitions:
    """The tags of a tokenizer: state -> [(tag, next state)].

    Args:
        tokenizer: mlx-lm's wrapper.
        tools: whether the model may call tools.
    """
    edges: Transitions = {"normal": [], "reasoning": [], "tool": []}
    if tokenizer.has_thinking:
        edges["normal"].append((tokenizer.think_start, "reasoning"))
        edges["reasoning"].append((tokenizer.think_end, "normal"))
    own: Transitions = getattr(tokenizer, "response_transitions", {})
    if tools and tokenizer.has_tool_calling:
        if not any(state == "tool" for rest in own.values() for _, state in rest):
            edges["normal"].append((tokenizer.tool_call_start, "tool"))
        edges["reasoning"].append((tokenizer.tool_call_start, "tool"))
        if tokenizer.tool_call_end:
            edges["tool"].append((tokenizer.tool_call_end, "normal"))
    for marker in getattr(tokenizer, "structural_markers", ()):
        edges["normal"].append((marker, "normal"))
    for state, rest in own.items():
        edges.setdefault(state, []).extend(edge for edge in rest if tools or edge[1] != "tool")
    return edges


def opens_thinking(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends with the tag that opens thinking, as templates write it for the model."""
    if not tokenizer.has_thinking:
        return False
    end = text_of(tokenizer, prompt[-LONGEST_TAG:])
    return end.rstrip().endswith(tokenizer.think_start)


class Splitter:
    """Cuts a text at tags as it comes.

    Args:
        transitions: from `transitions_of`.
        start: the first state.

    Attributes:
        state: at the end of the text so far.
    """

    def __init__(self, transitions: Transitions, start: str = "normal") -> None:
        self._transitions, self.state = transitions, start
        self._held = ""

    def feed(self, text: str) -> list[Run]:
        """The runs that are final now; the end of the text is held back while it may become a tag."""
        self._held += text
        runs: list[Run] = []
        while True:
            edges = self._transitions.get(self.state, [])
            found = [(at, -len(tag), tag, state) for tag, state in edges if (at := self._held.find(tag)) >= 0]
            if not found:
                break
            at, _, tag, state = min(found)  # the first one; of two at the same place, the longer
            runs += [Run(self.state, self._held[:at]), Run(state, tag, marker=True)]
            self._held, self.state = self._held[at + len(tag) :], state
        cut = len(self._held) - max((_overlap(self._held, tag) for tag, _ in edges), default=0)
        runs.append(Run(self.state, self._held[:cut]))
        self._held = self._held[cut:]
        return [run for run in runs if run.text]

    def finish(self) -> list[Run]:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return [Run(self.state, held)] if held else []


def _overlap(text: str, tag: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class AnswerParts:
    """Thinking, answer and tool calls of one text. Newlines at the borders between them belong to none.

    Args:
        tokenizer: mlx-lm's wrapper.
        settings: how to read the text.
        notes: counts, in words, the tool calls that could not be read.

    Attributes:
        n_calls: tool calls so far.
    """

    def __init__(self, tokenizer: Any, settings: PartsSettings, notes: Counter[str]) -> None:
        self._settings, self._notes = settings, notes
        tools = settings.tools is not None
        self._splitter = Splitter(transitions_of(tokenizer, tools), settings.start)
        self._parse: Callable[..., Any] | None = tokenizer.tool_parser if tools else None
        self._tags = (tokenizer.tool_call_start or "", tokenizer.tool_call_end or "")
        self._section = ""  # of a tool call that is being written
        self._newlines = {"normal": "", "reasoning": ""}  # held back: dropped if a tag follows
        self._fresh = settings.start != "normal"  # just behind a tag: newlines are dropped
        self.n_calls = 0

    def feed(self, text: str, reason: str | None = None) -> Parts:
        """The parts that are final with `text`.

        Args:
            text: the next piece.
            reason: why the text ends with it: "stop" or "length"; None if it goes on.
        """
        runs = self._splitter.feed(text)
        if reason is not None:
            runs += self._splitter.finish()
        found = {"normal": "", "reasoning": ""}
        calls: list[ToolCall] = []
        for run in runs:
            if run.marker:
                self._border(found, calls, self._tags[1])
            elif run.state == "tool":
                self._section += run.text
            elif run.state in found:
                found[run.state] += self._trimmed(run)
        if reason is not None:
            whole = reason == "stop" or not self._tags[1]
            self._close(found, calls, "", read=whole)
            for state, newlines in self._newlines.items():
                found[state] += newlines
        return Parts(found["normal"], found["reasoning"], tuple(calls))

    def _border(self, found: dict[str, str], calls: list[ToolCall], end: str) -> None:
        """At a tag: whatever was being written has ended."""
        self._close(found, calls, end, read=True)
        self._newlines = dict.fromkeys(self._newlines, "")
        self._fresh = True

    def _trimmed(self, run: Run) -> str:
        """The text of a run without newlines at borders."""
        text = run.text.lstrip("\r\n") if self._fresh else self._newlines[run.state] + run.text
        if not text:
            return ""
        self._fresh = False
        shown = text.rstrip("\r\n")
        self._newlines[run.state] = text[len(shown) :]
        return shown

    def _close(self, found: dict[str, str], calls: list[ToolCall], end: str, read: bool) -> None:
        """The tool calls of the section that has ended; as text, with its tags, if they cannot be read."""
        section, self._section = self._section, ""
        if not section.strip():
            return
        read_calls = self._calls(section) if read else []
        if not read_calls:
            self._notes[UNREAD_CALL] += 1
            found["normal"] += self._tags[0] + section + end
            return
        most = len(read_calls) if self._settings.parallel else max(0, 1 - self.n_calls)
        if len(read_calls) > most:
            self._notes[FURTHER_CALL] += len(read_calls) - most
        calls += read_calls[:most]
        self.n_calls += len(read_calls[:most])

    def _calls(self, section: str) -> list[ToolCall]:
        """The calls in a section; none if it cannot be read."""
        assert self._parse is not None
        try:
            parsed = self._parse(section, list(self._settings.tools or ()))
            return [_call(value) for value in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # mlx-lm's parsers raise whatever the model's text leads them to
            return []


class Thoughts:
    """Tells for each piece of a text whether it is thinking, its tags included.

    Args:
        tokenizer: mlx-lm's wrapper.
        prompt: token ids before the text; its last few are enough.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        start = "reasoning" if opens_thinking(tokenizer, prompt) else "normal"
        self._splitter = Splitter(transitions_of(tokenizer, tools=False), start)

    def take(self, text: str) -> bool:
        """Whether any of the next piece is thinking."""
        before = self._splitter.state
        runs = self._splitter.feed(text)
        return "reasoning" in (before, self._splitter.state, *(run.state for run in runs))


def ends_in_thought(tokenizer: Any, prompt: Sequence[int], text: str) -> bool:
    """Whether a whole text ends before its thinking does. Arguments as `told_apart`."""
    start = "reasoning" if opens_thinking(tokenizer, prompt) else "normal"
    splitter = Splitter(transitions_of(tokenizer, tools=False), start)
    splitter.feed(text)
    return splitter.state == "reasoning"


def told_apart(tokenizer: Any, prompt: Sequence[int], text: str) -> Parts:
    """Answer and thinking of a whole text; tool calls stay in the answer.

    Args:
        tokenizer: mlx-lm's wrapper.
        prompt: token ids before the text; its last few are enough.
    """
    start = "reasoning" if opens_thinking(tokenizer, prompt) else "normal"
    return AnswerParts(tokenizer, PartsSettings(start), Counter()).feed(text, "length")


def _call(parsed: Any) -> ToolCall:
    """A tool call from a parser's result; raises ValueError or TypeError if it is none."""
    name = parsed.get("name") if isinstance(parsed, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("the call names no tool")
    arguments = parsed.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no object")
    own = parsed.get("id")
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return ToolCall(own if isinstance(own, str) and own else new_call_id(), name, written)


def new_call_id() -> str:
    """A random id for a tool call."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))
