"""What the planner expected of every step and what came, as a line of JSON in the file that `MTP_MLX_TRACE` names.

Lines of several processes and runs may be in one file; each is written at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import ROOT
from mtp_mlx.errors import MTPError

VARIABLE = "MTP_MLX_TRACE"


@dataclass(frozen=True)
class TracedStep:
    """One step.

    Attributes:
        context: tokens in the cache before it.
        parents: [d] of the drafts verified, -1 for the pending token.
        drafters: [d] who drafted them.
        chances: [d] of each draft being right if its parent is, as the planner estimated them.
        slots: [d + 1] slots behind the pending token and each draft.
        chain: drafts made after the pass.
        accepted: drafts accepted, as numbers from 0, in order.
        expected_seconds: of the step, as the planner estimated them.
        seconds: that it took.
        plain_seconds: of a plain step, as the planner estimated them.
    """

    context: int
    parents: list[int]
    drafters: list[str]
    chances: list[float]
    slots: list[int]
    chain: int
    accepted: list[int]
    expected_seconds: float
    seconds: float
    plain_seconds: float

    @property
    def form(self) -> str:
        """The kind of layout, such as "plain", "drafts" or "tree and slots"; a tree is drafts with branches."""
        branches = self.parents != list(range(ROOT, len(self.parents) - 1))
        drafts = "tree" if branches else "drafts"
        parts = [drafts] * bool(self.parents) + ["slots"] * any(self.slots) + ["chain"] * bool(self.chain)
        return " and ".join(parts) or "plain"

    @property
    def tokens(self) -> int:
        """Tokens that it committed."""
        return 1 + len(self.accepted)

    @property
    def expected_tokens(self) -> float:
        """Tokens that its chances promised."""
        paths: list[float] = []
        for parent, chance in zip(self.parents, self.chances, strict=True):
            paths.append(chance if parent == ROOT else chance * paths[parent])
        return 1.0 + sum(paths)

    def reached(self) -> Iterator[tuple[str, float, bool]]:
        """(drafter, chance, whether it was right) of every draft whose parent was right."""
        right = set(self.accepted)
        for node, parent in enumerate(self.parents):
            if parent == ROOT or parent in right:
                yield self.drafters[node], self.chances[node], node in right


def traced(
    proposal: Proposal,
    layout: Layout,
    tokens: Sequence[int],
    context: int,
    seconds: tuple[float, float, float],
) -> TracedStep:
    """The record of a step that verified `proposal` in `layout` and committed `tokens`.

    Args:
        proposal: its drafts, with the planner's chances.
        layout: its layout.
        tokens: accepted drafts and the target's own pick.
        context: tokens in the cache before it.
        seconds: that the planner expected, that it took, and that a plain step would be expected to take.
    """
    tree, count = proposal.tree.cut(layout.drafts), layout.drafts
    accepted: list[int] = []
    for token in tokens[:-1]:
        end = accepted[-1] if accepted else ROOT
        accepted.append(
            next(node for node in range(count) if (tree.parents[node], tree.tokens[node]) == (end, token))
        )
    return TracedStep(
        context=context,
        parents=list(tree.parents),
        drafters=[proposal.source_of(node) for node in range(count)],
        chances=list(tree.chances),
        slots=list(layout.slots),
        chain=layout.chain,
        accepted=accepted,
        expected_seconds=seconds[0],
        seconds=seconds[1],
        plain_seconds=seconds[2],
    )


class Trace:
    """A file to which steps are appended; if it is removed or renamed meanwhile, a new one is begun.

    Raises:
        MTPError: if it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        with self._writing():
            self._file = self._opened()

    def write(self, step: TracedStep) -> None:
        """Appends a step.

        Raises:
            MTPError: if it cannot be written.
        """
        with self._writing():
            if self._is_gone():
                before, self._file = self._file, self._opened()
                os.close(before)
            os.write(self._file, (json.dumps(asdict(step)) + "\n").encode())

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _is_gone(self) -> bool:
        """Whether the open file is no longer the one of that name."""
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MTPError(f"{VARIABLE}: {self._path} cannot be written ({error.strerror})") from error


def open_trace() -> Trace | None:
    """The trace that the environment asks for, or None.

    Raises:
        MTPError: if it cannot be written.
    """
    path = os.environ.get(VARIABLE)
    return _opened(path) if path else None


@lru_cache(maxsize=4)
def _opened(path: str) -> Trace:
    return Trace(path)


def read_trace(path: Path, start: int = 0) -> Iterator[TracedStep]:
    """The steps of a file from byte `start` on.

    Raises:
        MTPError: if it cannot be read, or a line is not a step (with its text).
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            lines = file.read().splitlines()
    except OSError as error:
        raise MTPError(f"{path}: cannot be read ({error.strerror})") from error
    for line in lines:
        try:
            yield TracedStep(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise MTPError(f"{path}: not a step of a trace: {line[:60]!r}") from error
