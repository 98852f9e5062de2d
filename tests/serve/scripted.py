"""A server whose model writes what a script says, with drafting on: the script stands in for a model's judgement.

The weights are random; the script is a constraint that leaves one token at each position. The chat template has
tools, thinking and a switch for it, in the manner of Qwen3.5's: thinking before the last question is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mtp_mlx.decode.constraint import Constraint
from mtp_mlx.serve.app import Application, AppSettings
from mtp_mlx.serve.engine import Engine, EngineSettings
from mtp_mlx.serve.grammar import Grammars
from mtp_mlx.serve.prompts import Limits, Prompts
from mtp_mlx.serve.request import GenerationRequest
from mtp_mlx.serve.sequence import DecodeSettings, Sequence
from tests.serve.running import NAME, Server, load_model, save_model, served
from tests.tiny import hf_tokenizer

ROWS = 320  # of the model's embedding
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{% if message.reasoning_content and loop.index0 > last.question %}
{{- '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{{- message.content }}
{%- for made in message.tool_calls or [] %}{% set tool_call = made.function %}<tool_call>
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking %}<think>
{% else %}<think>

</think>

{% endif %}{% endif %}"""

Script = Callable[[str], str]  # the prompt's text -> what the model writes


def save_agent(root: Path, template: str = TEMPLATE) -> Path:
    """As `save_model`, with tags in the vocabulary, and a chat template that has tools and thinking."""
    save_model(root, ROWS)
    tokenizer = hf_tokenizer(300, chat_template=template)
    tokenizer.add_tokens(TAGS, special_tokens=False)
    tokenizer.save_pretrained(root / "model")
    return root


class Scripted:
    """A `Constraint` that allows the tokens of a script only; if there is a grammar, the script must fit it."""

    def __init__(self, tokens: list[int], vocab_size: int, grammar: Constraint | None = None) -> None:
        self._tokens, self._vocab_size, self._grammar = tokens, vocab_size, grammar
        self._at = 0

    def allowed(self, drafts: list[int]) -> np.ndarray:
        rows = np.zeros((1 + len(drafts), self._vocab_size), dtype=bool)
        for row in range(len(rows)):
            rows[row, self._tokens[min(self._at + row, len(self._tokens) - 1)]] = True
        if self._grammar is not None:
            assert self._grammar.allowed([])[0][rows[0]].all(), "the script leaves the grammar"
        return rows

    def commit(self, tokens: list[int]) -> None:
        self._at += len(tokens)
        if self._grammar is not None:
            self._grammar.commit(tokens)


class ScriptedEngine(Engine):
    """An engine whose model writes `script(prompt)`.

    Requests with a grammar are answered by the model itself, unless `strict`: then the script must fit it.
    """

    script: Script
    seen: list[str]  # the prompts
    strict = False

    def _sequence(self, request: GenerationRequest) -> Sequence:
        prompt = str(self.tokenizer.decode(request.prompt))
        self.seen.append(prompt)
        grammar = None
        if request.grammar is not None:
            if not self.strict:
                return super()._sequence(request)
            assert self.grammars is not None
            grammar = self.grammars.start(request.grammar)
        tokens = self.tokenizer.encode(self.script(prompt), add_special_tokens=False)
        constraint = Scripted([*tokens, self.tokenizer.eos_token_id], self.model.vocab_size, grammar)
        shared = 0 if self._batch is None else self._batch.own_drafts
        return Sequence(
            self.model, self.tokenizer, request, self.settings.decode, self.prefixes, constraint, shared
        )


@contextmanager
def acting(
    root: Path,
    script: Script,
    *,
    decode: DecodeSettings | None = None,
    app: AppSettings | None = None,
    limits: Limits | None = None,
    strict_model: bool = False,
    strict: bool = False,
) -> Iterator[Server]:
    """A server with the model of `save_agent` that writes `script(prompt)`; `strict` as in `ScriptedEngine`."""
    model, tokenizer = load_model(root)
    grammars = Grammars(tokenizer._tokenizer, model.vocab_size, sorted(tokenizer.eos_token_ids))
    settings = EngineSettings(decode=decode or DecodeSettings(layout="linear", lookup=True))
    engine = ScriptedEngine(model, tokenizer, settings, grammars=grammars)
    engine.script, engine.seen, engine.strict = script, [], strict
    limits = limits or Limits(default_output=200)
    prompts = Prompts(tokenizer, NAME, model.vocab_size, limits, grammars, strict_model)
    with served(Application(engine, prompts, app or AppSettings())) as port:
        yield Server(port, engine, prompts)


def call(name: str, arguments: str) -> str:
    """A tool call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def weather(prompt: str) -> str:
    """Calls a tool for each of two cities, then answers with what the tools said."""
    thought = "The user asks for the weather.\n</think>\n\n" if prompt.endswith("<think>\n") else ""
    results = [part.partition("</tool_response>")[0] for part in prompt.split("<tool_response>")[1:]]
    if not results:
        return f"{thought}Let me see.\n\n" + call("get_weather", '{"city": "Oslo", "days": [1, 2]}')
    if len(results) == 1:
        return thought + call("get_weather", '{"city": "Bergen"}')
    return f"{thought}Oslo: {results[0]}. Bergen: {results[1]}."


def agent_tool() -> dict[str, Any]:
    """The schema of the weather tool's parameters."""
    return {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}},
        "required": ["city"],
    }
