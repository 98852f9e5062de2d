"""OpenAI's chat completions and completions APIs: parsing requests.

In addition to OpenAI's fields, requests may have top_k, min_p, XTC's fields, repetition_penalty, the context sizes
of penalties and chat_template_kwargs (all as in mlx-lm), and responses have `mtp`. Penalties work as in mlx-lm: they
look at the last 20 tokens, including the prompt's, unless a context size is given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mtp_mlx.chat_template import Thinking, template_variables
from mtp_mlx.serve.effort import effort_option, thinking_by
from mtp_mlx.serve.fields import Fields, checked_text
from mtp_mlx.serve.openai_answers import ChatAnswer, CompletionAnswer
from mtp_mlx.serve.prompts import Prompts
from mtp_mlx.serve.request import GenerationRequest, RequestError
from mtp_mlx.serve.tools import ToolUse, by_choice, checked_tool, tool_list
from mtp_mlx.serve.turns import chat_turns

# Fields that have no effect on the text of a local model.
IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention verbosity".split()
)

MOST_TEXTS = 4  # of one request


def chat(body: dict[str, Any], prompts: Prompts) -> ChatAnswer:
    """Parse a request to /v1/chat/completions.

    Raises:
        RequestError: if a field is invalid or not supported.
    """
    fields = Fields(body, IGNORED)
    prompts.check_model(fields)
    fields.refuse("functions", "use tools", [])
    fields.refuse("function_call", "use tool_choice", "none", "auto")
    fields.refuse("modalities", "this server writes text only", ["text"])
    top = fields.integer("top_logprobs", most=20)
    if fields.flag("logprobs"):
        top = top or 0
    elif top is not None:
        raise RequestError("top_logprobs needs logprobs: true", field="top_logprobs")
    stream, usage = _streaming(fields)
    newer = fields.integer("max_completion_tokens", minimum=1)
    older = fields.integer("max_tokens", minimum=1)
    schema = format_schema(fields.take("response_format"))
    stop = fields.stops("stop")
    tools = tool_use(fields)
    thinking, options = thinking_of(fields, prompts)
    prompt = prompts.chat(chat_turns(fields.take("messages"), fields), tools, thinking, options)
    n, (marks, plain) = number(fields), own_options(fields)
    request = prompts.request(prompt, fields, newer or older, stop, top, schema)
    request = replace(request, marks=marks, plain=plain)
    return ChatAnswer(several(request, n), prompts, stream, usage)


def own_options(fields: Fields) -> tuple[bool, bool]:
    """Take `mtp`, this server's own options of a chat, {"marks": true, "layout": "plain"}: (marks, plain).

    Raises:
        RequestError: if it is no object, or an option has another value.
    """
    options = fields.take("mtp", {})
    if not isinstance(options, dict):
        raise RequestError("mtp must be an object", field="mtp")
    given = Fields(options)
    marks, layout = given.flag("marks"), given.text("layout")
    if layout not in (None, "plain"):
        raise RequestError('mtp.layout can only be "plain"', field="mtp")
    for name in given.left():
        fields.ignore(f"mtp.{name}")
    return marks, layout == "plain"


def tool_use(fields: Fields) -> ToolUse:
    """Take tools, tool_choice and parallel_tool_calls. Tools that are no functions are left out, and counted.

    Raises:
        RequestError: if one of them is invalid.
    """
    tools = []
    for i, tool in enumerate(tool_list(fields.take("tools"))):
        kind = checked_text(tool.get("type", "function"), f"tools[{i}].type")
        if kind != "function":
            fields.ignore(f"tools.{kind}")
            continue
        function = tool.get(
            "function", tool if "name" in tool else None
        )  # the responses API has no `function`
        if not isinstance(function, dict):
            raise RequestError(f"tools[{i}] must have a function", field="tools")
        function = {name: value for name, value in function.items() if name != "type"}
        where = f"tools[{i}].function"
        checked_tool(function.get("name"), function.get("description"), function.get("parameters"), where)
        tools.append({"type": "function", "function": function})  # as given: the template may show all of it
    parallel = fields.flag("parallel_tool_calls", default=True)
    return by_choice(tools, fields.take("tool_choice"), parallel)


def thinking_of(fields: Fields, prompts: Prompts) -> tuple[Thinking | None, dict[str, Any]]:
    """Take reasoning_effort and chat_template_kwargs: (thinking, further variables of the template)."""
    options = fields.take("chat_template_kwargs", {})
    if not isinstance(options, dict):
        raise RequestError("chat_template_kwargs must be an object", field="chat_template_kwargs")
    effort = fields.take("reasoning_effort")
    known = template_variables(prompts.tokenizer) if options or effort is not None else frozenset()
    for name in sorted(set(options) - known):
        fields.ignore(f"chat_template_kwargs.{checked_text(name, 'chat_template_kwargs')}")
    given = {name: value for name, value in options.items() if name in known}
    if effort is None:
        return None, given
    return thinking_by(effort, "reasoning_effort"), effort_option(effort, prompts) | given


def completion(body: dict[str, Any], prompts: Prompts) -> CompletionAnswer:
    """Parse a request to /v1/completions; raises like `chat`."""
    fields = Fields(body, IGNORED)
    prompts.check_model(fields)
    fields.refuse("best_of", "as many texts are written as n says", 1)
    fields.refuse("suffix", "text can only follow the prompt", "")
    top = fields.integer("logprobs", most=20)
    stream, usage = _streaming(fields)
    max_tokens = fields.integer("max_tokens", minimum=1)
    schema = format_schema(fields.take("response_format"))
    stop = fields.stops("stop")
    n, echo, prompt = number(fields), fields.flag("echo"), fields.take("prompt")
    if echo and top is not None:
        raise RequestError(
            "echo and logprobs exclude each other: the prompt has no log-probabilities", field="echo"
        )
    ids = prompts.text(prompt)
    request = prompts.request(ids, fields, max_tokens, stop, top, schema)
    before = prompts.spelt(prompt, ids) if echo else ""
    return CompletionAnswer(several(request, n), prompts, stream, usage, before)


def number(fields: Fields) -> int:
    """Take `n`, the number of texts."""
    n = fields.integer("n", 1, minimum=1, most=MOST_TEXTS)
    assert n is not None
    return n


def several(request: GenerationRequest, n: int) -> tuple[GenerationRequest, ...]:
    """`n` requests with seeds in succession, from the given one."""
    sampling = request.sampling
    seeds = [(sampling.seed + i) % 2**64 for i in range(n)]
    return tuple(replace(request, sampling=replace(sampling, seed=seed)) for seed in seeds)


def models(prompts: Prompts, created: int) -> dict[str, Any]:
    """The JSON of /v1/models."""
    entry = {"id": prompts.model_name, "object": "model", "created": created, "owned_by": "local"}
    return {"object": "list", "data": [entry]}


def _streaming(fields: Fields) -> tuple[bool, bool]:
    """(whether to stream, whether to end the stream with usage)."""
    options = fields.take("stream_options", {})
    stream = fields.flag("stream")
    if not isinstance(options, dict):
        raise RequestError("stream_options must be an object", field="stream_options")
    for name in sorted(set(options) - {"include_usage", "include_obfuscation"}):
        fields.ignore(f"stream_options.{checked_text(name, 'stream_options')}")
    return stream, options.get("include_usage") is True


def format_schema(response_format: Any, name: str = "response_format") -> dict[str, Any] | None:
    """The JSON schema of a response_format; None for text.

    Args:
        response_format: as in chat completions, or None.
        name: of the field that it is in, for errors.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        described = response_format.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if isinstance(schema, dict):
            return schema
        raise RequestError(f"{name}: the schema must be a JSON schema", field=name)
    raise RequestError(f"{name}.type must be text, json_object or json_schema", field=name)
