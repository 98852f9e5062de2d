"""Where the messages of a prompt end: there another prompt may go on in another way than this one does.

The next turn of a chat has the same messages with others behind them. Of what the model wrote itself, its thinking
say, the template may leave out some, so that the common prefix ends before the answer, or before all answers since
the last question.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from mtp_mlx.chat_template import said_ids
from mtp_mlx.errors import MTPError

QUESTION: dict[str, Any] = {"role": "user", "content": "?"}  # some templates reject conversations without one


def message_ends(
    tokenizer: Any,
    turns: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    options: dict[str, Any],
    ids: list[int],
) -> tuple[int, ...]:
    """Lengths of prefixes of a prompt: behind system messages and tools, the last question, and the last message.

    Those that the template does not allow to be found are left out.

    Args:
        turns, tools, options: of the conversation, as for `chat_ids`.
        ids: the prompt, which is that conversation up to where the answer begins.
    """
    system = list(takewhile(lambda turn: turn["role"] == "system", turns))
    parts = [[*system, QUESTION]] if system or tools else []
    question = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=len(turns))
    parts += [turns[: question + 1], turns] if question + 1 < len(turns) else [turns]
    found = set()
    for part in parts:
        try:
            said = said_ids(tokenizer, part, tools, options)
        except MTPError:
            continue
        found.add(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(said, ids, strict=False))))
    return tuple(sorted(found - {0}))
