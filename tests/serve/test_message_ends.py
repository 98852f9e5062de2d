"""The next turn of a chat reads only what is new, also where states cannot be trimmed, and the text is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.message_ends import message_ends
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block
from mtp_mlx.serve.engine import EngineSettings
from mtp_mlx.serve.sequence import DecodeSettings
from tests.serve.running import VOCABULARY, Server, serving
from tests.tiny import CHAT_TEMPLATE, SPECIFIC, save_tiny, tiny_tokenizer

FIRST = [
    {"role": "system", "content": "The fox and the dog rest in the sun together."},
    {"role": "user", "content": "Why is the sky blue? The air scatters the light of the sun."},
]
SECOND = [{"role": "assistant", "content": "Not what it wrote."}, {"role": "user", "content": "And then?"}]
ELSE = [FIRST[0], {"role": "user", "content": "In the beginning there was the word."}]


def saved_model(root: Path, architecture: str) -> Path:
    """A folder with a model of that architecture, for `serving`."""
    rows: dict[str, Any] = {"vocab_size": VOCABULARY}
    if architecture == "qwen3_5":
        rows = {"text_config": {**SPECIFIC["qwen3_5"]["text_config"], **rows}}
    save_tiny(root / "model", architecture, seed=3, **rows)
    return root


@pytest.fixture(scope="module", params=["qwen3_5", "lfm2", "gemma3", "rwkv7"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp(request.param), request.param)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of passes over more than one row, which with a plain layout are those of prompts."""
    rows, forward = [], AttachedModel.forward

    def counting(self: AttachedModel, block: Block, *args: Any, **more: Any) -> Any:
        if block.ids.shape[1] > 1:
            rows.append(block.ids.shape[1])
        return forward(self, block, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(AttachedModel, "forward", counting)
        yield rows


def said(server: Server, messages: list[dict[str, str]]) -> tuple[str, int, int]:
    """(text, tokens of the prompt, those of them from the prefix cache)."""
    body = {"messages": messages, "max_tokens": 12, "temperature": 0.5, "seed": 1}
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 200, answer
    used = answer["usage"]
    cached = used["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["message"]["content"], used["prompt_tokens"], cached


def settings(budget: int) -> EngineSettings:
    return EngineSettings(decode=DecodeSettings(layout="plain"), prefix_cache_bytes=budget)


def test_only_what_is_new_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [FIRST, FIRST + SECOND, ELSE]
    with serving(root, engine=settings(0)) as server:
        right = [said(server, turn) for turn in turns]
        assert [cached for _, _, cached in right] == [0, 0, 0]
    with serving(root, engine=settings(1 << 24)) as server:
        for number, turn in enumerate(turns):
            with counted(monkeypatch) as rows:
                text, length, cached = said(server, turn)
            assert (text, length) == right[number][:2]
            assert sum(rows) <= length - cached  # a last row that is alone is not counted
            if number == 1:  # all of the first turn up to "assistant"
                assert right[0][1] - 10 < cached < right[0][1]
            if number == 2:  # the system's message
                assert 20 < cached < right[0][1] - 20
        status, metrics = server.ask("/metrics")
        assert "mtp_mlx_prefix_cache_ends 7" in metrics, metrics
        assert server.engine.prefixes.nbytes > 0


def test_ends_of_a_conversation_with_tools() -> None:
    tokenizer = tiny_tokenizer(VOCABULARY, chat_template=CHAT_TEMPLATE)
    turns = [*FIRST, {"role": "assistant", "content": "fox"}, {"role": "tool", "content": "dog"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    found = [tokenizer.decode(ids[:n]) for n in message_ends(tokenizer, turns, None, {}, ids)]
    assert [text.rpartition("<|im_start|>")[2].replace("\n", " ")[:12] for text in found] == [
        "user ",
        "user Why is ",
        "tool dog<|im",
    ]


def test_a_template_that_takes_no_part_of_it() -> None:
    refusing = "{{ raise_exception('no') if not add_generation_prompt }}" + CHAT_TEMPLATE
    tokenizer = tiny_tokenizer(VOCABULARY, chat_template=refusing)
    ids = tokenizer.apply_chat_template(FIRST, add_generation_prompt=True)
    assert message_ends(tokenizer, FIRST, None, {}, ids) == ()
