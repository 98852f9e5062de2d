"""Proves that `n`, `echo` and `logit_bias` do what OpenAI's client expects of them, drafting on, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from mlx_lm.sample_utils import make_logits_processors

from mtp_mlx.api import chat_prompt, generate
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.errors import MTPError
from mtp_mlx.serve.engine import EngineSettings
from mtp_mlx.serve.fields import Fields
from mtp_mlx.serve.prompts import Prompts
from mtp_mlx.serve.sequence import DecodeSettings
from tests.serve.running import NAME, Server, load_model, save_model, serving

openai = pytest.importorskip("openai")

QUESTION = "The quick brown fox"
CHAT = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("fields"))


@pytest.fixture(scope="module", params=["plain", "quadratic"])
def server(request: pytest.FixtureRequest, root: Path) -> Iterator[Server]:
    with serving(root, engine=EngineSettings(decode=DecodeSettings(layout=request.param))) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(root: Path) -> tuple[Any, Any]:
    return load_model(root)


@pytest.fixture
def gpt(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(loaded: tuple[Any, Any], seeds: list[int], max_tokens: int) -> list[str]:
    """What the model writes alone with each seed."""
    model, tokenizer = loaded
    prompt = chat_prompt(tokenizer, QUESTION)
    return [
        generate(
            model, tokenizer, prompt, max_tokens, sampling=SamplingConfig(1.0, seed=seed), layout="plain"
        )
        for seed in seeds
    ]


def test_several_texts(server: Server, gpt: Any, loaded: Any) -> None:
    """With seeds in succession; the first is that of a request for one."""
    texts = expected(loaded, [7, 8, 9], 12)
    assert len(set(texts)) == 3
    asked = {"model": NAME, "messages": CHAT, "max_tokens": 12, "seed": 7, "temperature": 1.0}
    answer = gpt.chat.completions.create(**asked, n=3)
    assert [choice.message.content for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.mtp["seed"] for choice in answer.choices] == [7, 8, 9]
    one = gpt.chat.completions.create(**asked)
    assert (
        one.choices[0].message.content == texts[0] and one.usage.prompt_tokens == answer.usage.prompt_tokens
    )
    written = [len(loaded[1].encode(text)) for text in texts]
    assert answer.usage.completion_tokens >= max(written) and answer.usage.completion_tokens <= 36
    streamed = ["", "", ""]
    usage = {"include_usage": True}
    chunks = list(gpt.chat.completions.create(**asked, n=3, stream=True, stream_options=usage))
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts and chunks[-1].usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert len(reasons) == 3
    completions = gpt.completions.create(model=NAME, prompt=QUESTION, n=2, max_tokens=4, temperature=0)
    assert [choice.text for choice in completions.choices] == [completions.choices[0].text] * 2
    server.settle()


def test_a_client_that_leaves_frees_all_texts(server: Server, gpt: Any) -> None:
    stream = gpt.chat.completions.create(
        model=NAME, messages=CHAT, n=4, max_tokens=2000, temperature=1.0, stream=True
    )
    next(iter(stream))
    stream.close()
    server.settle()


def test_more_texts_than_the_queue_holds(root: Path) -> None:
    settings = EngineSettings(queue=0, concurrent=2, decode=DecodeSettings(layout="plain"))
    with serving(root, engine=settings) as running:
        status, answer = running.ask("/v1/chat/completions", {"messages": CHAT, "n": 3, "max_tokens": 500})
        assert status == 429 and "queue" in answer["error"]["message"]
        running.settle()
        assert running.ask("/v1/chat/completions", {"messages": CHAT, "n": 2, "max_tokens": 5})[0] == 200


def test_echo(gpt: Any, loaded: Any) -> None:
    ids = loaded[1].encode(QUESTION)
    for prompt in (QUESTION, [QUESTION], ids):
        asked = {"model": NAME, "prompt": prompt, "max_tokens": 5, "temperature": 0}
        text = gpt.completions.create(**asked).choices[0].text
        assert gpt.completions.create(**asked, echo=True).choices[0].text == QUESTION + text
        chunks = list(gpt.completions.create(**asked, echo=True, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == QUESTION + text
    with pytest.raises(openai.BadRequestError, match="echo and logprobs"):
        gpt.completions.create(model=NAME, prompt="a", echo=True, logprobs=1)


@pytest.mark.parametrize("penalty", [0.0, 0.6])
def test_logit_bias_is_mlx_lm_s(gpt: Any, root: Path, penalty: float) -> None:
    model, tokenizer = mlx_lm.load(str(root / "model"))[:2]
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    plain = [response.token for response in mlx_lm.stream_generate(model, tokenizer, ids, 16)]
    bias = {plain[0]: -100.0, plain[3]: -3.0, 65: 4.0}
    processors = make_logits_processors(logit_bias=bias, presence_penalty=penalty)
    right = "".join(
        response.text
        for response in mlx_lm.stream_generate(model, tokenizer, ids, 16, logits_processors=processors)
    )
    answer = gpt.chat.completions.create(
        model=NAME,
        messages=CHAT,
        max_tokens=16,
        temperature=0,
        logit_bias={str(token): value for token, value in bias.items()},
        presence_penalty=penalty,
    )
    assert answer.choices[0].message.content == right != tokenizer.decode(plain)


def test_xtc_is_mlx_lm_s(gpt: Any, loaded: Any) -> None:
    """The fields of mlx-lm's server; a newline and the ends of a text are never dropped."""
    model, tokenizer = loaded
    spared = (*tokenizer.encode("\n"), *sorted(tokenizer.eos_token_ids))
    sampling = SamplingConfig(1.0, seed=7, xtc_probability=0.8, xtc_threshold=0.01, xtc_special_tokens=spared)
    right = generate(
        model, tokenizer, chat_prompt(tokenizer, QUESTION), 12, sampling=sampling, layout="plain"
    )
    asked = {"model": NAME, "messages": CHAT, "max_tokens": 12, "seed": 7, "temperature": 1.0}
    xtc = {"xtc_probability": 0.8, "xtc_threshold": 0.01}
    answer = gpt.chat.completions.create(**asked, extra_body=xtc)
    assert answer.choices[0].message.content == right != expected(loaded, [7], 12)[0]
    request = Prompts(tokenizer, NAME, model.vocab_size).request([5, 6], Fields(dict(xtc)), 4, ())
    assert request.sampling.xtc_special_tokens == spared and request.ignored == ()
    off = gpt.chat.completions.create(**asked, extra_body={"xtc_threshold": 0.7})
    assert off.choices[0].message.content == expected(loaded, [7], 12)[0]
    with pytest.raises(openai.BadRequestError, match="xtc_threshold is 0.7 but must be from 0 to 0.5"):
        gpt.chat.completions.create(**asked, extra_body={"xtc_probability": 0.5, "xtc_threshold": 0.7})


def test_a_bias_of_an_id_that_the_model_lacks(loaded: tuple[Any, Any]) -> None:
    """From Python too: MLX would write beyond the logits."""
    model, tokenizer = loaded
    with pytest.raises(MTPError, match="logit_bias has the token id 300"):
        generate(model, tokenizer, "a", 2, sampling=SamplingConfig(logit_bias=((300, 1.0),)), layout="plain")


def test_marks_say_where_tokens_come_from(server: Server, gpt: Any) -> None:
    """Only where they are asked for; the text is the same."""
    asked = {"model": NAME, "messages": CHAT, "max_tokens": 12, "stream": True}
    plain = [chunk for chunk in gpt.chat.completions.create(**asked)]
    assert [hasattr(chunk, "mtp") for chunk in plain[:-1]] == [False] * (len(plain) - 1)
    marked = [chunk for chunk in gpt.chat.completions.create(**asked, extra_body={"mtp": {"marks": True}})]
    texts = ["".join(chunk.choices[0].delta.content or "" for chunk in one) for one in (plain, marked)]
    assert texts[0] == texts[1]
    marks = [chunk.mtp for chunk in marked if chunk.choices[0].delta.content]
    assert all(
        {"drafter", "depth", "steps", "tokens", "written_in", "acceptance"} <= mark.keys() for mark in marks
    )
    assert [bool(mark["drafter"]) for mark in marks] == [mark["depth"] > 0 for mark in marks]
    assert [mark["tokens"] for mark in marks] == sorted({mark["tokens"] for mark in marks})


def test_an_answer_can_be_written_plainly(server: Server) -> None:
    status, answer = server.ask(
        "/v1/chat/completions",
        {"messages": CHAT, "max_tokens": 12, "mtp": {"layout": "plain", "colour": "red"}},
    )
    assert status == 200 and answer["mtp"]["rows_per_step"] == 1.0
    assert any("mtp.colour" in reason for reason in answer["mtp"]["fallbacks"])


@pytest.mark.parametrize("options", [5, {"layout": "linear"}, {"marks": "yes"}])
def test_other_options_of_its_own_are_refused(server: Server, options: Any) -> None:
    status, answer = server.ask("/v1/chat/completions", {"messages": CHAT, "mtp": options})
    assert status == 400 and "m" in answer["error"]["param"]
