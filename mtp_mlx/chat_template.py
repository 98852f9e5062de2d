"""Messages -> token ids or text, through the chat template of a model.

A template is a program that comes with the model, so it may raise anything; here that is one sentence. It may also
leave out what it does not know, such as tool calls.
"""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateAssertionError, TemplateSyntaxError

from mtp_mlx.errors import MTPError
from mtp_mlx.token_ids import check_ids


def chat_ids(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, up to where the answer begins.

    Raises:
        MTPError: if the template does not parse, or rejects the messages, as many do with a system message.
    """
    ids = _apply(tokenizer, messages, tools, add_generation_prompt=True)
    if not isinstance(ids, (list, tuple)):  # transformers 5 returns a BatchEncoding, or a list
        ids = ids["input_ids"]
    if ids and not isinstance(ids[0], int):
        ids = ids[0]
    return [int(token) for token in ids]


def chat_text(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, *, answer_follows: bool
) -> str:
    """A conversation in the tokenizer's chat template.

    Args:
        answer_follows: end where the assistant's answer begins.

    Raises:
        MTPError: as `chat_ids`.
    """
    return str(_apply(tokenizer, messages, tools, add_generation_prompt=answer_follows, tokenize=False))


def check_template(tokenizer: Any, vocab_size: int) -> None:
    """Tries the chat template, if there is one, on a message that every template should take.

    Args:
        vocab_size: V, rows of the model's embedding.

    Raises:
        MTPError: if it does not parse or fails, or makes an id that the model has no row for.
    """
    if tokenizer.has_chat_template:
        ids = chat_ids(tokenizer, [{"role": "user", "content": "Hello"}])
        check_ids(ids, vocab_size, "the chat template", tokenizer)


def _apply(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, **how: Any) -> Any:
    if tools is not None:
        how["tools"] = tools
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except (TemplateSyntaxError, TemplateAssertionError) as error:
        raise MTPError(
            f"the model's chat template does not parse (line {error.lineno}: {error.message}): take "
            "tokenizer_config.json, and chat_template.jinja if there is one, from the original model"
        ) from error
    except Exception as error:  # whatever the template computes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MTPError(f"the model's chat template rejects these messages: {reason}") from error
