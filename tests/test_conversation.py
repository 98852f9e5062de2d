"""Proves that a turn prefills only what is new, that its text is generate's, and that stopping does no harm."""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest

from mtp_mlx.api import generate
from mtp_mlx.conversation import Conversation
from mtp_mlx.decode.cache_check import check_prompt_cache
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.block import Block
from tests.decode.fakes import random_adapter
from tests.drafters.heads.test_chain import model_with_heads
from tests.tiny import tiny_model, tiny_tokenizer

QUESTIONS = ["The sky", "and the dog?", "print(add(1, 2))"]


def model(architecture: str = "llama") -> AttachedModel:
    base = tiny_model(architecture, seed=3)
    return attach(base, random_adapter(base) if architecture == "llama" else None)


def said(conversation: Conversation, text: str, **options: Any) -> str:
    return "".join(response.text for response in conversation.ask(text, 16, **options))


class Rows:
    """Counts the rows of every pass, and stops a pass on demand."""

    def __init__(self, attached: AttachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.stop_at = 0, 1 << 30
        # The first check of a cache builds a pass that is never evaluated; it is not counted.
        held = attached.make_cache()
        attached.forward(Block.real(mx.array([[3]])), held)
        check_prompt_cache(attached, held)
        forward = attached.forward

        def counting(block: Any, cache: Any) -> Any:
            if self.count >= self.stop_at:
                self.stop_at = 1 << 30
                raise KeyboardInterrupt
            self.count += block.ids.shape[1]
            return forward(block, cache)

        monkeypatch.setattr(attached, "forward", counting)


@pytest.mark.parametrize("layout", ["plain", "quadratic", "linear"])
@pytest.mark.parametrize("system", [None, "Be brief. In the beginning there was the word."])
def test_text_is_generate_s_and_only_the_new_part_is_run(
    layout: str, system: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached, tokenizer = model(), tiny_tokenizer()
    conversation = Conversation(attached, tokenizer, system)
    rows = Rows(attached, monkeypatch)
    messages = [{"role": "system", "content": system}] if system else []
    before = 0
    for question in QUESTIONS:
        rows.count = 0
        answer = said(conversation, question, layout=layout)
        run = rows.count
        turn = conversation.turns[-1]
        messages.append({"role": "user", "content": question})
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        assert answer == generate(attached, tokenizer, ids, 16, layout="plain")
        messages.append({"role": "assistant", "content": answer})
        assert conversation.messages == messages and turn.text == answer
        assert turn.prompt_tokens == len(ids) and not turn.stopped
        # The whole of it is prefilled once; later turns leave out what the cache holds already.
        assert turn.prefilled == len(ids) - before if before else turn.prefilled == len(ids)
        if layout == "plain":
            assert run == turn.prefilled + len(turn.tokens) - 1 or run == turn.prefilled + len(turn.tokens)
        before = conversation._held() or 0
    assert conversation.restarts == 0 and len(conversation.turns) == 3
    assert conversation.turns[2].prefilled < conversation.turns[2].prompt_tokens / 2


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.5}, {"frequency_penalty": 0.7, "frequency_context_size": 200}]
)
def test_penalties_look_at_what_the_cache_holds(penalty: dict[str, Any]) -> None:
    attached, tokenizer = model(), tiny_tokenizer()
    conversation = Conversation(attached, tokenizer)
    sampling = SamplingConfig(temperature=0.7, seed=2, **penalty)
    messages = []
    for question in [*QUESTIONS, "Again", "and again"]:
        answer = said(conversation, question, sampling=sampling)
        messages.append({"role": "user", "content": question})
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        assert answer == generate(attached, tokenizer, ids, 16, layout="plain", sampling=sampling)
        messages.append({"role": "assistant", "content": answer})


@pytest.mark.parametrize("after", [1, 5])
def test_a_closed_answer_stays_as_far_as_it_came(after: int) -> None:
    attached, tokenizer = model(), tiny_tokenizer()
    conversation = Conversation(attached, tokenizer)
    with closing(conversation.ask(QUESTIONS[0], 16, layout="quadratic")) as responses:
        begun = [next(responses) for _ in range(after)]
    turn = conversation.turns[0]
    assert (
        turn.stopped
        and turn.tokens == [r.token for r in begun]
        and turn.text == "".join(r.text for r in begun)
    )
    assert conversation.messages[-1] == {"role": "assistant", "content": turn.text}
    answer = said(conversation, QUESTIONS[1])
    ids = list(tokenizer.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True))
    assert answer == generate(attached, tokenizer, ids, 16, layout="plain")


@pytest.mark.parametrize(("stop_at", "kept"), [(0, False), (28, True)])
def test_ctrl_c_inside_a_pass(stop_at: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In prefill nothing of the turn stays; in an answer what was said stays. Either way the next turn is right."""
    attached, tokenizer = model(), tiny_tokenizer()
    conversation = Conversation(attached, tokenizer)
    rows = Rows(attached, monkeypatch)
    said(conversation, QUESTIONS[0])
    rows.count, rows.stop_at = 0, stop_at
    with pytest.raises(KeyboardInterrupt):
        said(conversation, QUESTIONS[1], layout="plain")
    assert len(conversation.turns) == 1 + kept == len(conversation.messages) // 2
    answer = said(conversation, QUESTIONS[2])
    ids = list(tokenizer.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True))
    assert answer == generate(attached, tokenizer, ids, 16, layout="plain")
    assert conversation.turns[-1].prefilled < len(ids), "what was sound of the cache is used"


def test_a_refused_option_changes_nothing() -> None:
    conversation = Conversation(model(), tiny_tokenizer())
    first = said(conversation, QUESTIONS[0])
    for text, options in (("x", {"slots": 99}), ("  ", {})):
        with pytest.raises(MTPError):
            said(conversation, text, **options)
    assert len(conversation.messages) == 2 and conversation.messages[1]["content"] == first
    held = conversation._held()
    said(conversation, QUESTIONS[1])
    turn = conversation.turns[-1]
    assert held is not None and turn.prompt_tokens - turn.prefilled >= held - 1


def test_reset_forgets_all_but_the_system_message() -> None:
    conversation = Conversation(model(), tiny_tokenizer(), "Be brief.")
    first = said(conversation, QUESTIONS[0])
    said(conversation, QUESTIONS[1])
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}] and not conversation.turns
    assert said(conversation, QUESTIONS[0]) == first
    assert conversation.turns[0].prefilled == conversation.turns[0].prompt_tokens


@pytest.mark.parametrize("architecture", ["qwen3_next", "rwkv7", "gemma3_text"])
def test_a_turn_goes_on_from_the_end_of_the_last_question(architecture: str) -> None:
    """Where what cannot be trimmed was copied: a template leaves out what was thought before an answer."""
    attached, tokenizer = model(architecture), tiny_tokenizer()
    conversation = Conversation(attached, tokenizer, "Be brief. In the beginning there was the word.")
    for question in QUESTIONS:
        answer = said(conversation, question)
        ids = list(tokenizer.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True))
        assert answer == generate(attached, tokenizer, ids, 16, layout="plain")
        conversation.messages[-1]["content"] = "other words"
    for before, turn in pairwise(conversation.turns):
        assert before.prompt_tokens - 10 < turn.prompt_tokens - turn.prefilled <= before.prompt_tokens
    assert conversation.restarts == 0 and len(conversation._copies) > 1


def test_a_cache_that_cannot_be_cut_is_made_anew_and_counted() -> None:
    """The recurrent state of qwen3_next cannot give a question's rows back once the text goes another way."""
    attached, tokenizer = model("qwen3_next"), tiny_tokenizer()
    conversation = Conversation(attached, tokenizer)
    said(conversation, QUESTIONS[0])
    conversation.messages[-2]["content"] = "other words"
    answer = said(conversation, QUESTIONS[1])
    ids = list(tokenizer.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True))
    assert answer == generate(attached, tokenizer, ids, 16, layout="plain")
    assert conversation.restarts == 1 and conversation.turns[-1].prefilled == len(ids)


def test_heads_draft_from_what_follows_the_cached_part() -> None:
    attached, tokenizer = model_with_heads("llama", 2, 3), tiny_tokenizer()
    conversation = Conversation(attached, tokenizer)
    for question in QUESTIONS[:2]:
        answer = said(conversation, question, layout="linear")
        ids = list(tokenizer.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True))
        assert answer == generate(attached, tokenizer, ids, 16, layout="plain")
    assert conversation.turns[1].prefilled < conversation.turns[1].prompt_tokens


def test_without_a_chat_template() -> None:
    attached, tokenizer = model(), tiny_tokenizer(chat_template=None)
    conversation = Conversation(attached, tokenizer)
    answer = said(conversation, QUESTIONS[0])
    assert answer == generate(attached, tokenizer, QUESTIONS[0], 16)
    again = said(conversation, QUESTIONS[1])
    assert again == generate(attached, tokenizer, f"{QUESTIONS[0]}\n{answer}\n{QUESTIONS[1]}", 16)
