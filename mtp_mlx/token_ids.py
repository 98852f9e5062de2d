"""Token ids where they come in and where they go out.

In: an id is right where the model's embedding has a row for it, whether the tokenizer knows it or not; many models
have more rows than their tokenizer has tokens. Any other id is refused, since MLX reads beyond the embedding for it.

Out: an id that the tokenizer does not know has no text. Tokenizers' own `decode` leaves such ids out, so the
texts here do the same, and count them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mtp_mlx.errors import MTPError


def check_ids(ids: Sequence[int], rows: int, what: str, tokenizer: Any = None) -> None:
    """Refuses ids that the model has no row for.

    Args:
        ids: token ids.
        rows: V, rows of the model's embedding.
        what: where the ids are from, to begin the message with.
        tokenizer: that made them, if one did.

    Raises:
        MTPError: at the first id that is negative, or V or more.
    """
    if not ids or (min(ids) >= 0 and max(ids) < rows):
        return
    wrong = next(token for token in ids if not 0 <= token < rows)
    outside = f"{wrong}, which is outside the vocabulary: the model's embedding has rows for 0 to {rows - 1}"
    if tokenizer is not None and knows(tokenizer, wrong):
        raise MTPError(
            f"{what} has the token {tokenizer.convert_ids_to_tokens(wrong)!r}, whose id is {outside}; take the "
            "tokenizer's files from the original model, or resize the embedding to the tokenizer"
        )
    raise MTPError(f"{what} has the token id {outside}")


def knows(tokenizer: Any, token: int) -> bool:
    """Whether the tokenizer has a token of that id."""
    try:
        return tokenizer.convert_ids_to_tokens(token) is not None
    except (LookupError, ValueError, OverflowError):  # sentencepiece and tokenizers in Python raise
        return False


def spared_by_xtc(tokenizer: Any) -> tuple[int, ...]:
    """The ids that XTC never drops, as in mlx-lm: those of a newline, and of the tokens that end a text."""
    return (*tokenizer.encode("\n"), *sorted(tokenizer.eos_token_ids))


def text_of(tokenizer: Any, ids: Iterable[int]) -> str:
    """The text of token ids, in which ids that the tokenizer does not know are left out."""
    known = [token for token in ids if knows(tokenizer, token)]
    return str(tokenizer.decode(known)) if known else ""
