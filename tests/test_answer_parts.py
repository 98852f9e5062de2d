"""Proves that thinking, answer and tool calls are told apart wherever the text is cut into pieces, in every format
that mlx-lm has a parser for, and that no text is lost."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections import Counter
from typing import Any

import mlx_lm.tool_parsers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_mlx.answer_parts import UNREAD_CALL, AnswerParts, PartsSettings, Splitter

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WITH_TOOLS = PartsSettings(tools=(TOOL,))

# One call of get_weather(city="Oslo") in each format, between its tags; from the models' chat templates.
FORMATS = {
    "function_gemma": "call:get_weather{city:<escape>Oslo<escape>}",
    "gemma4": 'call:get_weather{city:<|"|>Oslo<|"|>}',
    "glm47": "get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n",
    "json_tools": '\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n',
    "kimi_k2": "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|>',
    "kimi_k3": '<|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" type="string"<|sep|>Oslo'
    "<|close|>argument<|sep|><|close|>call<|sep|>",
    "laguna": "get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n",
    "longcat": "get_weather\n<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Oslo</longcat_arg_value>\n",
    "minicpm5": '"get_weather"><param name="city">Oslo</param>',
    "minimax_m2": '\n<invoke name="get_weather">\n<parameter name="city">Oslo</parameter>\n</invoke>\n',
    "mistral": 'get_weather[ARGS]{"city": "Oslo"}',
    "muse_spark": '<atem:invoke name="get_weather">\n<atem:parameter name="city">Oslo'
    "</atem:parameter>\n</atem:invoke>",
    "pythonic": '[get_weather(city="Oslo")]',
    "qwen3_coder": "\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n",
}
INSTALLED = [module.name for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)]


class Tokenizer:
    """The tags and the parser of a tokenizer."""

    has_thinking, think_start, think_end = True, "<think>", "</think>"

    def __init__(self, parser: str = "json_tools") -> None:
        module: Any = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
        self.has_tool_calling, self.tool_parser = True, module.parse_tool_call
        self.tool_call_start, self.tool_call_end = module.tool_call_start, module.tool_call_end


def read(
    text: str, cuts: list[int], how: PartsSettings, tokenizer: Any = None, reason: str = "stop"
) -> tuple[str, str, list[tuple[str, Any]], Counter[str]]:
    """(answer, thinking, calls, notes) of a text that comes in pieces, cut at `cuts`."""
    notes: Counter[str] = Counter()
    parts = AnswerParts(tokenizer or Tokenizer(), how, notes)
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in zip(bounds, bounds[1:])]
    found = [parts.feed(piece) for piece in pieces[:-1]] + [parts.feed(pieces[-1], reason)]
    calls = [(call.name, json.loads(call.arguments)) for one in found for call in one.calls]
    assert len(calls) == parts.n_calls
    return "".join(one.text for one in found), "".join(one.thinking for one in found), calls, notes


CUTS = st.lists(st.integers(0, 400), max_size=12)


@settings(max_examples=60, deadline=None)
@given(cuts=CUTS)
def test_parts_do_not_depend_on_the_pieces(cuts: list[int]) -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "<b>"}}\n</tool_call>'
    text = f"Is 1 < 2?\nYes.\n</think>\n\nLet me <t> see.\n\n{call}\n{call}"
    answer, thinking, calls, notes = read(text, cuts, PartsSettings("reasoning", (TOOL,)))
    assert (answer, thinking) == ("Let me <t> see.", "Is 1 < 2?\nYes.")
    assert calls == [("get_weather", {"city": "<b>"})] * 2 and not notes


@settings(max_examples=60, deadline=None)
@given(text=st.text("<>/think \n", max_size=40), cuts=CUTS)
def test_a_text_without_tags_is_the_text(text: str, cuts: list[int]) -> None:
    if "<think>" not in text:
        assert read(text, cuts, PartsSettings()) == (text, "", [], Counter())


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab<", max_size=30), cuts=CUTS)
def test_the_splitter_loses_nothing(text: str, cuts: list[int]) -> None:
    splitter = Splitter({"normal": [("a<", "other"), ("a<b", "normal")], "other": [("<b", "normal")]})
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    runs = [run for a, b in zip(bounds, bounds[1:]) for run in splitter.feed(text[a:b])] + splitter.finish()
    assert "".join(run.text for run in runs) == text


def test_every_parser_of_mlx_lm_is_tried() -> None:
    assert sorted(FORMATS) == sorted(INSTALLED)


@pytest.mark.parametrize("parser", sorted(set(FORMATS) & set(INSTALLED)))
def test_formats(parser: str) -> None:
    tokenizer = Tokenizer(parser)
    text = f"Well. {tokenizer.tool_call_start}{FORMATS[parser]}{tokenizer.tool_call_end}"
    for cuts in ([], list(range(len(text)))):
        answer, _, calls, notes = read(text, cuts, WITH_TOOLS, tokenizer)
        assert calls == [("get_weather", {"city": "Oslo"})] and answer == "Well. " and not notes


@pytest.mark.parametrize(
    "section",
    ["", " ", "5", "[]", "null", "{}", '{"name": 5}', '{"name": "x", "arguments": "no"}', '{"name":'],
)
def test_what_is_no_call_is_text(section: str) -> None:
    text = f"a <tool_call>{section}</tool_call> b"
    answer, _, calls, notes = read(text, [], WITH_TOOLS)
    lost = not section.strip()  # tags with nothing between them say nothing
    assert not calls and answer == ("a  b" if lost else text) and notes[UNREAD_CALL] == (0 if lost else 1)


def test_a_call_that_the_limit_cuts_is_text() -> None:
    text = '<tool_call>{"name": "x", "arguments": {}}'
    assert read(text, [], WITH_TOOLS, reason="length")[0] == text
    assert read(text, [], WITH_TOOLS)[2] == [("x", {})]  # the model only left out the tag


def test_thinking_that_is_cut_has_no_answer() -> None:
    assert read("Hm, let me", [3], PartsSettings("reasoning"), reason="length")[:2] == ("", "Hm, let me")
    assert read("Hm</thi", [3], PartsSettings("reasoning"), reason="length")[:2] == ("", "Hm</thi")


def test_a_call_in_the_middle_of_thinking() -> None:
    text = 'Hm<tool_call>{"name": "x"}</tool_call>So.'
    assert read(text, [], PartsSettings("reasoning", (TOOL,)))[:3] == ("So.", "Hm", [("x", {})])


def test_ids_are_the_model_s_or_new() -> None:
    parts = AnswerParts(Tokenizer("kimi_k2"), WITH_TOOLS, Counter())
    text = f"<|tool_calls_section_begin|>{FORMATS['kimi_k2']}<|tool_calls_section_end|>"
    assert parts.feed(text, "stop").calls[0].id == "functions.get_weather:0"
    mistral = AnswerParts(Tokenizer("mistral"), WITH_TOOLS, Counter())
    one, two = mistral.feed('[TOOL_CALLS]a[ARGS]{}b[ARGS]{"x": 1}', "stop").calls
    assert one.id != two.id and len(one.id) == 9 and one.id.isalnum()  # as Mistral's templates want it


def test_formats_with_headers() -> None:
    """Muse Spark's messages each have a header, whose text is dropped; a call has a header of its own."""
    from mlx_lm.chat_templates.muse_spark import RESPONSE_FORMAT

    class Headed(Tokenizer):
        has_thinking = False
        response_initial_state = RESPONSE_FORMAT["initial_state"]
        response_transitions = RESPONSE_FORMAT["transitions"]

    tokenizer = Headed("muse_spark")
    section = FORMATS["muse_spark"]
    call = f"{tokenizer.tool_call_start}{section}{tokenizer.tool_call_end}"
    text = f"to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>Well.<|eom|><|start|>x{call}<|eot|>"
    start = tokenizer.response_initial_state
    for cuts in ([], list(range(len(text)))):
        answer, thinking, calls, notes = read(text, cuts, PartsSettings(start, (TOOL,)), tokenizer)
        assert (
            (answer, thinking) == ("Well.", "Hm.")
            and calls == [("get_weather", {"city": "Oslo"})]
            and not notes
        )
