"""A conversation of several turns with one prompt cache: each turn prefills only what the cache does not hold yet.

Invariant between turns: the cache holds exactly the token ids `_cached`. A turn encodes the whole conversation with
the chat template, keeps the prefix of the cache that it shares with these ids, and passes the rest to
`stream_generate`, so the text is what `generate` writes for the same messages. Recurrent state and a sliding window
that has moved on cannot be trimmed: they are copied where the messages of a prompt end, because the template may
leave out what was thought before an answer, and a turn goes on from the last copy that still holds. Without one the
turn starts with an empty cache, and `restarts` counts that.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.answer_parts import told_apart
from mtp_mlx.api import GenerationResponse, encode_prompt, stream_generate
from mtp_mlx.chat_template import Thinking, chat_ids, thinking_options
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.rollback import LayerCaches, needs_copies, take_back
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.message_ends import message_ends
from mtp_mlx.model.attach import AttachedModel

MOST_COPIES = 4  # of states, for one cache

Message = dict[str, str]


@dataclass
class Turn:
    """One answer.

    Attributes:
        prompt_tokens: tokens of the conversation up to the answer.
        prefilled: those of them that were not in the cache.
        stats: counts of decoding.
        tokens: ids of the answer, including an end-of-text id.
        text, thinking: the answer, and what the model thought before it.
        last: the last response, or None before the first token.
        stopped: whether Ctrl-C or the consumer ended it.
    """

    prompt_tokens: int
    prefilled: int
    stats: DecodeStats = field(default_factory=DecodeStats)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    thinking: str = ""
    last: GenerationResponse | None = None
    stopped: bool = False


class Conversation:
    """The messages of a conversation, and their prompt cache.

    Args:
        model, tokenizer: from `mtp_mlx.load`.
        system: system message, or None for the chat template's default.
        thinking: "on" or "off", through the template's own switch; "auto" leaves it to mlx-lm.

    Attributes:
        messages: all messages so far, the system message first; a stopped answer is kept as far as it got. The
            thinking before it is its `reasoning_content`, of which the template keeps as much as it wants.
        turns: one per answer.
        restarts: how often the cache was emptied, because it could not be trimmed or did not say what it holds.
    """

    def __init__(
        self,
        model: AttachedModel,
        tokenizer: TokenizerWrapper,
        system: str | None = None,
        thinking: Thinking = "auto",
    ) -> None:
        self._model, self._tokenizer, self._system = model, tokenizer, system
        self._options = thinking_options(tokenizer, thinking)
        self.reset()

    def reset(self) -> None:
        """Forgets all messages except the system message."""
        self.messages: list[Message] = []
        if self._system:
            self.messages.append({"role": "system", "content": self._system})
        self.turns: list[Turn] = []
        self.restarts = 0
        self._empty_cache()

    def _empty_cache(self) -> None:
        self._cache: list[Any] = self._model.make_cache()
        self._cached: list[int] = []
        self._copies: dict[int, list[Any]] = {}  # by length, what the cache cannot be trimmed to

    def ask(
        self,
        text: str,
        max_tokens: int = 512,
        *,
        on_prompt: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Generator[GenerationResponse, None, None]:
        """Yields the answer to `text` token by token; closing the generator, or Ctrl-C inside it, stops the answer.

        A stopped answer stays in the conversation as far as it got; if it has no token, its question is dropped too.
        When the answer ends, its turn is the last of `turns`.

        Args:
            text: the user's message.
            max_tokens: most tokens of the answer; -1 for no limit.
            on_prompt: called with the number of tokens of the whole conversation before it is read.
            options: as for `stream_generate`, except prompt_cache and stats, which are the conversation's own.

        Raises:
            MTPError: if the message is empty, the chat template rejects it, or an option is wrong; the conversation
                is then unchanged.
        """
        if not text.strip():
            raise MTPError("the message is empty: write some text")
        question: Message = {"role": "user", "content": text}
        messages = [*self.messages, question]
        ids = self._encode(messages)
        sampling = options.get("sampling") or SamplingConfig()
        # Penalties depend on the last tokens of the prompt, so these always run again.
        shared = self._keep_shared(ids, max(1, sampling.history_size))
        turn, copies = Turn(len(ids), len(ids) - shared), self._wanted_copies(messages, ids, shared)
        if on_prompt is not None:
            on_prompt(len(ids))
        responses = stream_generate(
            self._model,
            self._tokenizer,
            ids[shared:],
            max_tokens,
            prompt_cache=self._cache,
            prefix=ids[:shared],
            states_at=copies,
            stats=turn.stats,
            **options,
        )
        try:
            with closing(responses):
                for response in responses:
                    turn.tokens.append(response.token)
                    turn.text += response.text
                    turn.last = response
                    yield response
        except (KeyboardInterrupt, GeneratorExit):
            turn.stopped = True
            raise
        finally:
            made = {shared + end: states for end, states in copies.items() if states}
            self._copies = dict(sorted((self._copies | made).items())[-MOST_COPIES:])
            self._take(question, ids, turn)

    def _wanted_copies(self, messages: list[Message], ids: list[int], shared: int) -> dict[int, list[Any]]:
        """Where behind the `shared` tokens in the cache states are to be copied, as `mtp_generate_step` takes it."""
        if not needs_copies(self._cache) or not self._tokenizer.has_chat_template:
            return {}
        turns: list[dict[str, Any]] = [dict(message) for message in messages]
        ends = message_ends(self._tokenizer, turns, None, self._options, ids)
        return {end - shared: [] for end in ends if shared < end < len(ids)}

    def _take(self, question: Message, ids: list[int], turn: Turn) -> None:
        """Records an answer, complete or stopped, and what the cache holds now."""
        whole = turn.last is not None and turn.last.finish_reason is not None and not turn.stopped
        held = self._held(len(ids) + len(turn.tokens) if whole else 0)
        said = [*ids, *turn.tokens]
        if held is None or held > len(said):
            self.restarts += 1
            self._empty_cache()
        else:
            self._cached = said[:held]
        parts = told_apart(self._tokenizer, ids, turn.text)
        turn.text, turn.thinking = parts.text, parts.thinking
        if turn.tokens:
            if self._model.text_source is not None:
                self._model.text_source.learn(ids, turn.tokens)
            thinking = {"reasoning_content": turn.thinking} if turn.thinking else {}
            self.messages += [question, {"role": "assistant", "content": turn.text, **thinking}]
            self.turns.append(turn)

    def _encode(self, messages: list[Message]) -> list[int]:
        """Token ids of the conversation up to where the answer begins."""
        if not self._tokenizer.has_chat_template:
            return encode_prompt(self._tokenizer, "\n".join(message["content"] for message in messages))
        return chat_ids(self._tokenizer, messages, options=self._options)

    def _keep_shared(self, ids: list[int], spare: int) -> int:
        """Trims the cache to the prefix it shares with `ids` without the last `spare`; returns its length."""
        shared = 0
        for cached, wanted in zip(self._cached, ids[:-spare], strict=False):
            if cached != wanted:
                break
            shared += 1
        surplus = len(self._cached) - shared
        if surplus and can_trim_prompt_cache(self._cache):
            trim_prompt_cache(self._cache, surplus)
        elif surplus:
            shared = max((length for length in self._copies if length <= shared), default=0)
            if not shared:
                self.restarts += 1
                self._empty_cache()
                return 0
            take_back(self._cache, len(self._cached) - shared, self._copies[shared])
        self._cached = ids[:shared]
        self._copies = {length: states for length, states in self._copies.items() if length <= shared}
        return shared

    def _held(self, known: int = 0) -> int | None:
        """Number of tokens in the cache; `known`, if not 0, or else None if it does not say."""
        try:
            caches = LayerCaches(self._cache, "", known)
        except MTPError:
            return None
        try:
            return caches.length
        finally:
            caches.hand_back()
