"""The online objective the slow way: one forward pass per region and per token, the loss in numpy.

Shares no code with the layouts, the passes or the objective under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mtp_mlx.train.data import Example

Rows = Callable[
    [list[int], int], np.ndarray
]  # (tokens, masks behind them) -> [T + masks, C] of a causal sequence


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def loss(
    examples: Sequence[Example],
    k: int,
    offset: int,
    region_rows: int,
    supervision: str,
    student: Rows,
    teacher: Rows,
    own_first: bool,
) -> tuple[float, int]:
    """(mean loss, supervised rows).

    Args:
        student, teacher: logits over the vocabulary.
        own_first: the row of the last real token learns too (real rows are trained).
    """
    real = region_rows - (k - 1)
    losses = []
    for example in examples:
        text = list(example.tokens)
        for anchor in range(real - 1 - offset, len(text) - 2, real):
            if anchor < example.loss_start - 1:
                continue
            prefix = text[: anchor + 1]
            rows = log_softmax(student(prefix, k - 1)[anchor:])  # k rows
            said = rows.argmax(-1).tolist()
            for j in range(k):
                if (j == 0 and not own_first) or anchor + j + 1 >= len(text):
                    continue
                if supervision == "ground-truth":
                    losses.append(-rows[j][text[anchor + j + 1]])
                    continue
                marks = log_softmax(teacher(prefix + said[:j], 0)[-1])
                if supervision == "hard-teacher":
                    losses.append(-rows[j][marks.argmax()])
                else:
                    losses.append((np.exp(marks) * (marks - rows[j])).sum())
    return float(np.mean(losses)), len(losses)
