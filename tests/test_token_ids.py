"""Proves that ids without a row are refused where they come in, and that ids without a token have no text."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)

from mtp_mlx.api import generate
from mtp_mlx.conversation import Conversation
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.seams import embedding_rows
from mtp_mlx.serve.fields import Fields
from mtp_mlx.serve.prompts import Prompts
from mtp_mlx.serve.request import RequestError
from mtp_mlx.text import WITHOUT_TEXT, AnswerText
from mtp_mlx.token_ids import check_ids, knows, text_of
from mtp_mlx.train.data import Example, check_examples
from mtp_mlx.train.distill_rows import Prompt, encode_prompt
from tests.tiny import VOCABULARY, hf_tokenizer, tiny_model, tiny_tokenizer

UNKNOWN = VOCABULARY + 3
DETOKENIZERS = [BPEStreamingDetokenizer, SPMStreamingDetokenizer, NaiveStreamingDetokenizer]


def extended() -> TokenizerWrapper:
    """A tokenizer with one token more than the tiny models have rows."""
    tokenizer = hf_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return TokenizerWrapper(tokenizer, BPEStreamingDetokenizer)


def test_ids_are_checked_against_the_rows_of_the_embedding() -> None:
    check_ids([], 5, "it")
    check_ids([0, 4], 5, "it")
    for wrong in (-1, 5, 10**6):
        with pytest.raises(MTPError, match=f"it has the token id {wrong}, which is outside .* 0 to 4$"):
            check_ids([1, wrong, 2], 5, "it", tiny_tokenizer() if wrong == 10**6 else None)
    with pytest.raises(MTPError, match="it has the token '<extra>', whose id is 157.*resize the embedding"):
        check_ids([157], 157, "it", extended())


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "nemotron_h"])
def test_the_rows_are_found_in_every_kind_of_model(architecture: str) -> None:
    model = tiny_model(architecture)
    assert embedding_rows(model) == VOCABULARY == attach(model).vocab_size


def test_every_entry_checks() -> None:
    """Generation, conversations, the server, distillation and training name the token that has no row."""
    tokenizer, model = extended(), tiny_model("llama", seed=3)
    attached, rows = attach(model), VOCABULARY
    prompts = Prompts(tokenizer, "tiny", rows)
    for entry in (
        lambda: generate(attached, tokenizer, "the <extra>", max_tokens=2),
        lambda: list(Conversation(attached, tokenizer).ask("the <extra>", 2)),
        lambda: prompts.request(prompts.text("the <extra>"), Fields({}), 2, ()),
        lambda: prompts.request(prompts.text([3, 157]), Fields({}), 2, ()),
        lambda: encode_prompt(Prompt({"prompt": "the <extra>"}, "p.jsonl, line 1", "", ""), tokenizer, rows),
        lambda: check_examples([Example([1, 2], 1), Example([1, 157], 1)], rows),
    ):
        with pytest.raises((MTPError, RequestError), match="157.*outside the vocabulary"):
            entry()


@pytest.mark.parametrize("kind", DETOKENIZERS)
def test_ids_that_the_tokenizer_does_not_know_have_no_text(kind: Any) -> None:
    """They do not end a text, whatever mlx-lm's detokenizer makes of them ("!", an IndexError)."""
    tokenizer = TokenizerWrapper(hf_tokenizer(), kind)
    known = tokenizer.encode("the quick fox", add_special_tokens=False)
    notes: Counter[str] = Counter()
    plain = AnswerText(tokenizer, (), 99)
    answer = AnswerText(tokenizer, (), 99, notes)
    expected = "".join(plain.feed(token)[0] for token in [*known, tokenizer.eos_token_id])
    ids = [UNKNOWN, *[one for token in known for one in (token, 10**6)], tokenizer.eos_token_id]
    assert "".join(answer.feed(token)[0] for token in ids) == expected != ""
    assert notes == {WITHOUT_TEXT: len(known) + 1} and answer.count == len(ids)
    assert (
        text_of(tokenizer, [UNKNOWN, *known, 2**40]) == "the quick fox"
        and text_of(tokenizer, [UNKNOWN]) == ""
    )
    assert knows(tokenizer, VOCABULARY - 1) and not knows(tokenizer, VOCABULARY)


def test_a_model_with_more_rows_than_tokens_writes_on() -> None:
    """A padded model that prefers its padding: the text has none of it, and the response says so."""
    model = tiny_model("llama", seed=3, vocab_size=VOCABULARY + 8)
    model.lm_head.weight = model.lm_head.weight.at[VOCABULARY:].multiply(9.0)
    attached, tokenizer = attach(model), tiny_tokenizer()
    from mtp_mlx.api import stream_generate

    found = list(stream_generate(attached, tokenizer, "the", 24, layout="plain"))
    unknown = [response for response in found if response.token >= VOCABULARY]
    assert unknown and found[-1].stats.fallbacks[WITHOUT_TEXT] == len(unknown)
    text = "".join(response.text for response in found)
    assert text.strip() == text_of(tokenizer, [response.token for response in found]).strip()
