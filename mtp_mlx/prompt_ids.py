"""A prompt as text or as a message -> token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.chat_template import Thinking, begun_ids, chat_ids, ids_behind, thinking_options
from mtp_mlx.decode.loop import token_ids

Prompt = str | mx.array | np.ndarray | Sequence[int]


def encode_prompt(tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, adding special tokens by the same rule as mlx-lm."""
    if not isinstance(prompt, str):
        return token_ids(prompt)
    bos = tokenizer.bos_token
    return list(tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos)))


def chat_prompt(
    tokenizer: TokenizerWrapper,
    prompt: str,
    system: str | None = None,
    thinking: Thinking = "auto",
    *,
    begin: str | None = None,
    options: Mapping[str, Any] | None = None,
    behind: bool = False,
) -> list[int]:
    """Token ids of a user's message in the tokenizer's chat template, or as plain text if it has none.

    Args:
        thinking: "on" or "off", through the template's own switch; "auto" leaves it to mlx-lm.
        begin: what the answer begins with, or None.
        options: further variables of the template.
        behind: leave out what comes before the user's message, which a prompt cache holds.

    Raises:
        MTPError: if the template rejects the messages, or has no such switch.
    """
    options = {**thinking_options(tokenizer, thinking), **(options or {})}
    if not tokenizer.has_chat_template:
        return encode_prompt(tokenizer, prompt)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    if begin:
        messages.append({"role": "assistant", "content": begin})
    if behind:
        return ids_behind(tokenizer, messages, options)
    return (
        begun_ids(tokenizer, messages, options) if begin else chat_ids(tokenizer, messages, options=options)
    )
