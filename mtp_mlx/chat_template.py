"""Messages -> token ids or text, through the chat template of a model.

A template is a program that comes with the model, so it may raise anything; here that is one sentence. It may also
leave out what it does not know, such as tool calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from jinja2 import Environment, meta
from jinja2.exceptions import TemplateAssertionError, TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from mtp_mlx.errors import MTPError
from mtp_mlx.token_ids import check_ids

Thinking = Literal["auto", "on", "off"]

SWITCHES = ("enable_thinking", "thinking")  # the names under which templates switch thinking

# Arguments of transformers' `apply_chat_template` that say what it returns, and none of its variables.
OURS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "self",
    "tools",
    "documents",
    "chat_template",
    "kwargs",
}


def chat_ids(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: Any = None,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, up to where the answer begins.

    Args:
        tools: tools in OpenAI's form, or None.
        options: further variables of the template, such as `enable_thinking`.

    Raises:
        MTPError: if the template does not parse, or rejects the messages, as many do with a system message; or an
            option is no variable of a template.
    """
    return _as_list(_apply(tokenizer, messages, tools, options, add_generation_prompt=True))


def said_ids(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: Any = None,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """As `chat_ids`, but up to the end of the last message."""
    return _as_list(_apply(tokenizer, messages, tools, options, add_generation_prompt=False))


def begun_ids(
    tokenizer: Any, messages: list[dict[str, Any]], options: Mapping[str, Any] | None = None
) -> list[int]:
    """As `chat_ids`, but what follows belongs to the last message."""
    return _as_list(_apply(tokenizer, messages, None, options, continue_final_message=True))


def _as_list(ids: Any) -> list[int]:
    """Token ids as transformers returns them: a list, or (5) a BatchEncoding, or a list in a list."""
    if not isinstance(ids, (list, tuple)):
        ids = ids["input_ids"]
    if ids and not isinstance(ids[0], int):
        ids = ids[0]
    return [int(token) for token in ids]


def open_ids(tokenizer: Any, text: str, system: str | None = None) -> list[int]:
    """Token ids of a user's message that is not complete, as mlx-lm's cache_prompt makes them.

    Raises:
        MTPError: as `chat_ids`.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return begun_ids(tokenizer, messages)


def ids_behind(
    tokenizer: Any, messages: list[dict[str, Any]], options: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a conversation from its last user's message on, for a prefix that is cached: as in mlx-lm.

    If the last message is the assistant's, the answer goes on behind it.

    Args:
        options: as for `chat_ids`.

    Raises:
        MTPError: as `chat_ids`.
    """
    mark, last = "<query>", max(i for i, message in enumerate(messages) if message["role"] == "user")
    marked = [{**message, "content": mark} if i == last else message for i, message in enumerate(messages)]
    how = "continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt"
    given = {how: True, "tokenize": False}
    whole, shown = (str(_apply(tokenizer, texts, None, options, **given)) for texts in (messages, marked))
    return [int(token) for token in tokenizer.encode(whole[shown.index(mark) :], add_special_tokens=False)]


def chat_text(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: Any = None,
    options: Mapping[str, Any] | None = None,
    *,
    answer_follows: bool,
) -> str:
    """A conversation in the tokenizer's chat template.

    Args:
        options: further variables of the template.
        answer_follows: end where the assistant's answer begins.

    Raises:
        MTPError: as `chat_ids`.
    """
    how = {"add_generation_prompt": answer_follows, "tokenize": False}
    return str(_apply(tokenizer, messages, tools, options, **how))


def template_variables(tokenizer: Any) -> frozenset[str]:
    """Names that the chat template reads from outside, other than those that every template is given.

    For a template that is a Python function, the switches among its parameters, or `enable_thinking` if it takes any
    name, as mlx-lm's own functions do.
    """
    function = getattr(tokenizer, "_chat_template", None)
    own = getattr(type(tokenizer._tokenizer), "apply_chat_template", None)
    if function is None and own is not PreTrainedTokenizerBase.apply_chat_template:
        function = own
    if function is not None:
        parameters = inspect.signature(function).parameters
        named = frozenset(SWITCHES) & frozenset(parameters)
        takes_any = any(given.kind is given.VAR_KEYWORD for given in parameters.values())
        return named or (frozenset(SWITCHES[:1]) if takes_any else frozenset())
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several templates by name, of which transformers takes one
        return frozenset().union(*(_variables(text) for text in template.values()))
    return _variables(template) if isinstance(template, str) else frozenset()


@lru_cache(maxsize=16)
def _variables(template: str) -> frozenset[str]:
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:  # tags that only transformers knows, or no template at all
        return frozenset(name for name in SWITCHES[:1] if name in template)
    read = meta.find_undeclared_variables(tree)
    always = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset(read) - frozenset(always) - {"messages", "raise_exception", "strftime_now"}


def thinking_options(tokenizer: Any, thinking: Thinking) -> dict[str, Any]:
    """The template's variables that turn thinking on or off; none for "auto", which leaves it to mlx-lm.

    Raises:
        MTPError: if thinking cannot be turned off, or the model has none.
    """
    if thinking == "auto":
        return {}
    known = template_variables(tokenizer)
    switches = [name for name in SWITCHES if name in known]
    if switches:
        return dict.fromkeys(switches, thinking == "on")
    if thinking == "on" and tokenizer.has_thinking:
        return {}  # it always thinks
    has = "no switch for thinking" if tokenizer.has_thinking else "no thinking to turn " + thinking
    raise MTPError(f"the model's chat template has {has}: leave thinking at auto")


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


def _apply(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any, options: Mapping[str, Any] | None, **how: Any
) -> Any:
    for name in options or ():
        if name in OURS:
            raise MTPError(f"{name!r} is no variable of a chat template: leave it out")
    how = {**(options or {}), **how} | ({} if tools is None else {"tools": tools})
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
