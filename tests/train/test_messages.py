"""Proves that chats are trained on as people have them: parts of text, tool calls, null beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.train.data import load_examples
from mtp_mlx.train.messages import messages_prompt_ids, read_messages
from tests.tiny import tiny_tokenizer

# As in Qwen's templates: arguments are an object, and the text may be empty.
CALLS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = tiny_tokenizer(chat_template=CALLS)
ASKED = {"role": "user", "content": "the sun"}
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
CALLED = '<call>look {"at": "sky"}</call>'
HEAD = "<|im_start|>user\nthe sun<|im_end|>\n<|im_start|>assistant\n"


def example(tmp_path: Path, *messages: Any, tokenizer: Any = TOKENIZER, **fields: Any) -> tuple[str, str]:
    """The texts of the prompt and of the response."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": list(messages), **fields}) + "\n")
    (found,), _ = load_examples(path, tokenizer, 999)
    return TOKENIZER.decode(found.tokens[: found.loss_start]), TOKENIZER.decode(
        found.tokens[found.loss_start :]
    )


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_answer_of_tool_calls_is_what_the_template_writes(tmp_path: Path, content: dict[str, Any]) -> None:
    answer = {"role": "assistant", "tool_calls": [CALL], **content}
    assert example(tmp_path, ASKED, answer) == (HEAD, f"{CALLED}<|im_end|>")
    assert example(tmp_path, ASKED, answer, finished=False) == (HEAD, CALLED)


def test_text_beside_tool_calls_is_part_of_the_answer(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
    assert example(tmp_path, ASKED, answer) == (HEAD, f"I look.{CALLED}<|im_end|>")


def test_null_in_the_prompt_is_not_rendered_as_a_word(tmp_path: Path) -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    seen, answer = {"role": "tool", "content": "blue"}, {"role": "assistant", "content": "The sky is blue."}
    prompt, response = example(tmp_path, ASKED, calling, seen, answer)
    assert prompt == HEAD + CALLED + "<|im_end|>\n<|im_start|>tool\nblue<|im_end|>\n<|im_start|>assistant\n"
    assert "None" not in prompt and response == "The sky is blue.<|im_end|>"


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "sun"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "blue"}]}
    assert example(tmp_path, {"role": "user", "content": parts}, answer) == (HEAD, "blue<|im_end|>")


def test_arguments_that_are_no_json_stay_text() -> None:
    odd = {"function": {"name": "look", "arguments": "{at"}}
    (read,) = read_messages([{"role": "assistant", "tool_calls": [odd, {"name": "bare"}]}], "here")
    assert read == {"role": "assistant", "content": "", "tool_calls": [odd, {"name": "bare"}]}


def test_a_template_that_leaves_calls_out_is_refused(tmp_path: Path) -> None:
    answer = {"role": "assistant", "tool_calls": [CALL]}
    with pytest.raises(MTPError, match="line 1: .*writes nothing of the tool call 'look'"):
        example(tmp_path, ASKED, answer, tokenizer=tiny_tokenizer())
    with pytest.raises(MTPError, match="here: .*writes nothing of the tool call 'look'"):
        messages_prompt_ids(tiny_tokenizer(), [ASKED, answer, ASKED], None, "here")


def test_a_template_that_writes_the_prompt_otherwise_before_calls_is_refused(tmp_path: Path) -> None:
    other = tiny_tokenizer(chat_template="{{ messages | length }}" + CALLS)
    with pytest.raises(MTPError, match="line 1: .*writes the prompt in another way where tool calls follow"):
        example(tmp_path, ASKED, {"role": "assistant", "tool_calls": [CALL]}, tokenizer=other)
