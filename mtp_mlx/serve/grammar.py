"""JSON schema as a constraint on tokens, with llguidance (extra `[serve]`).

The library says which tokens may come next; the decoding loop masks the model's logits accordingly
(`mtp_mlx.decode.constraint`). Drafting stays on.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mtp_mlx.decode.constraint import Constraint
from mtp_mlx.errors import MTPError, needs_extra

# A weak model may write endless white space where JSON allows it; this is enough for indented objects.
WHITESPACE = r"[ \n\t\r]{0,24}"


class Grammars:
    """Compiles schemas for one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocab_size: number of columns of the model's logits.
        eos_ids: end-of-text tokens.

    Raises:
        MTPError: if llguidance is not installed or cannot use this tokenizer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: list[int]) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise needs_extra("JSON schemas need", "llguidance", "serve") from error
        self._library = llguidance
        self._vocab_size, self._eos_ids = vocab_size, sorted(eos_ids)
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=vocab_size, eos_token=self._eos_ids
            )
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise MTPError(f"this model's tokenizer does not support JSON schemas: {error}") from error

    def from_schema(self, schema: dict[str, Any]) -> str:
        """The grammar of a JSON schema; `{"type": "object"}` allows any object.

        Raises:
            MTPError: if the library does not support the schema, or no text satisfies it.
        """
        matcher = self._library.LLMatcher
        try:
            grammar = matcher.grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_pattern": WHITESPACE}
            )
        except (ValueError, TypeError) as error:
            raise MTPError(f"the JSON schema cannot be used: {error}") from error
        problem = matcher.validate_grammar(grammar, self._tokenizer)
        if problem and not problem.startswith("WARNING"):
            raise MTPError(f"the JSON schema cannot be used: {' '.join(problem.split())[:300]}")
        # The library compiles schemas such as {"$ref": "#"}, with which the text would end before its first token.
        if not (self.start(str(grammar)).allowed([])[0] & ~self._only_eos()).any():
            raise MTPError("the JSON schema cannot be used: no text satisfies it")
        return str(grammar)

    def start(self, grammar: str) -> GrammarConstraint:
        """A constraint for one text."""
        matcher = self._library.LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise MTPError(f"the grammar cannot be used: {matcher.get_error()}")
        return GrammarConstraint(matcher, self._only_eos())

    def _only_eos(self) -> np.ndarray:
        """[V] bool: end-of-text tokens."""
        mask = np.zeros(self._vocab_size, dtype=bool)
        mask[self._eos_ids] = True
        return mask


class GrammarConstraint:
    """A `mtp_mlx.decode.constraint.Constraint` that advances an llguidance matcher along the text.

    Args:
        matcher: at the beginning of the text.
        only_eos: [V] bool, end-of-text tokens.
    """

    def __init__(self, matcher: Any, only_eos: np.ndarray) -> None:
        self._matcher = matcher
        self._only_eos, self._vocab_size = only_eos, len(only_eos)

    def allowed(self, drafts: list[int]) -> np.ndarray:
        """See `Constraint.allowed`."""
        masks = [self._mask()]
        consumed = 0
        for draft in drafts:
            ends = self._only_eos[draft] or self._matcher.is_stopped()  # later rows are never read
            if ends or not self._matcher.try_consume_tokens([draft]):
                break
            consumed += 1
            masks.append(self._mask())
        if consumed and not self._matcher.rollback(consumed):
            raise MTPError(f"the grammar library failed: {self._matcher.get_error()}")
        unread = np.ones((1 + len(drafts) - len(masks), self._vocab_size), dtype=bool)
        return np.concatenate([np.stack(masks), unread])

    def _mask(self) -> np.ndarray:
        """[V] bool."""
        if self._matcher.is_error():
            raise MTPError(f"the grammar library failed: {self._matcher.get_error()}")
        if self._matcher.is_stopped():
            return self._only_eos
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)

    def commit(self, tokens: list[int]) -> None:
        """See `Constraint.commit`."""
        for token in tokens:
            if self._matcher.is_stopped():
                return
            if not self._matcher.consume_token(token):
                raise MTPError(f"the grammar library failed: {self._matcher.get_error()}")


class AfterThinking:
    """A `Constraint` that lets the model think freely, and takes effect behind the tag that ends its thinking.

    Args:
        inner: for the answer.
        end: [n] token ids of the tag, n >= 1.
        vocab_size: V, columns of the masks.
    """

    def __init__(self, inner: Constraint, end: tuple[int, ...], vocab_size: int) -> None:
        self._inner, self._end, self._vocab_size = inner, end, vocab_size
        self._last: list[int] = []  # the last n - 1 tokens at most
        self._thinking = True

    def allowed(self, drafts: list[int]) -> np.ndarray:
        """See `Constraint.allowed`."""
        n_free = self._free(drafts)
        free = np.ones((n_free, self._vocab_size), dtype=bool)
        if n_free == len(drafts) + 1:
            return free
        return np.concatenate([free, self._inner.allowed(drafts[n_free:])])

    def commit(self, tokens: list[int]) -> None:
        """See `Constraint.commit`."""
        n_free = self._free(tokens)
        self._inner.commit(tokens[n_free:])
        self._thinking = self._thinking and n_free > len(tokens)
        self._last = [*self._last, *tokens][-len(self._end) :]

    def _free(self, tokens: list[int]) -> int:
        """How many rows are free: one for each of `tokens` up to the tag's last, and one more if it is not there."""
        if not self._thinking:
            return 0
        text = list(self._last)
        for i, token in enumerate(tokens):
            text.append(token)
            if tuple(text[-len(self._end) :]) == self._end:
                return i + 1
        return len(tokens) + 1
