"""How many tokens a model was made for."""

from __future__ import annotations

from typing import Any

from mtp_mlx.files import warn_once


def context_length(model: Any) -> int | None:
    """The context length in the configuration of an mlx-lm model, in tokens, or None if it has none."""
    args = getattr(model, "args", None)
    text = getattr(args, "text_config", None)
    for found in (
        getattr(args, "max_position_embeddings", None),
        text.get("max_position_embeddings") if isinstance(text, dict) else None,
    ):
        if isinstance(found, int) and found > 0:
            return found
    return None


def beyond_context(model: Any, tokens: int) -> str | None:
    """A note if a prompt of so many tokens is longer than the context of an mlx-lm model, otherwise None."""
    most = context_length(model)
    if most is None or tokens <= most:
        return None
    return (
        f"the prompt has {tokens:,} tokens, but the model's context is {most:,} (max_position_embeddings): "
        "the text may be poor; shorten the prompt"
    )


def warn_beyond(model: Any, tokens: int) -> None:
    """Logs `beyond_context` of the first prompt that is too long, where many prompts are run."""
    if note := beyond_context(model, tokens):
        warn_once("context", f"{note} (said of the first such prompt only)")
