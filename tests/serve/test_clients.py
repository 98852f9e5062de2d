"""The `openai` and `anthropic` clients, unmodified, get the text that `generate` writes, streamed or not, with stop
strings, penalties, log-probabilities and JSON schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mtp_mlx.api import chat_prompt, generate, stream_generate
from mtp_mlx.chat_template import chat_ids
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.serve.engine import EngineSettings
from mtp_mlx.serve.sequence import DecodeSettings
from tests.serve.running import NAME, Server, load_model, save_model, serving

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

QUESTION = "The quick brown fox"
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module", params=["plain", "quadratic"])
def server(request: pytest.FixtureRequest, root: Path) -> Iterator[Server]:
    with serving(root, engine=EngineSettings(decode=DecodeSettings(layout=request.param))) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(root: Path) -> tuple[Any, Any]:
    """Another copy of the model, for what the text should be."""
    return load_model(root)


@pytest.fixture
def gpt(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server: Server) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def right(loaded: tuple[Any, Any], max_tokens: int, stop: tuple[str, ...] = (), **sampling: Any) -> str:
    """What `mtp-mlx generate` writes: the plain loop on a model of its own."""
    model, tokenizer = loaded
    prompt = chat_prompt(tokenizer, QUESTION)
    chosen = SamplingConfig(**sampling)
    return generate(model, tokenizer, prompt, max_tokens, sampling=chosen, layout="plain", stop=stop)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_chat_writes_what_generate_writes(gpt: Any, loaded: Any, seed: int, temperature: float) -> None:
    text = right(loaded, 20, seed=seed, temperature=temperature)
    asked = {"model": NAME, "messages": user(QUESTION), "max_tokens": 20, "seed": seed}
    answer = gpt.chat.completions.create(**asked, temperature=temperature)
    assert answer.choices[0].message.content == text
    chunks = list(gpt.chat.completions.create(**asked, temperature=temperature, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    assert answer.usage.completion_tokens <= 20 and answer.usage.total_tokens == (
        answer.usage.prompt_tokens + answer.usage.completion_tokens
    )
    assert answer.mtp["lossless"] is True and answer.mtp["steps"] >= 1
    assert answer.mtp["seed"] == seed and chunks[-1].mtp["tokens_per_step"] >= 1


def test_warps_and_penalties(gpt: Any, loaded: Any) -> None:
    sampling = {"top_k": 9, "min_p": 0.02, "repetition_penalty": 1.2, "repetition_context_size": 30}
    own = {"temperature": 1.1, "top_p": 0.95, "presence_penalty": 0.4, "frequency_penalty": 0.2, "seed": 5}
    for _ in range(2):  # the second time with the prompt's keys and values from the cache
        answer = gpt.chat.completions.create(
            model=NAME, messages=user(QUESTION), max_tokens=20, **own, extra_body=sampling
        )
        assert answer.choices[0].message.content == right(loaded, 20, **sampling, **own)


def test_stop_strings(gpt: Any, claude: Any, loaded: Any) -> None:
    text = right(loaded, 24)
    stop = text[len(text) // 2 :][:2]
    before = text[: text.find(stop)]
    for given in (stop, ["~~~~", stop]):
        answer = gpt.chat.completions.create(
            model=NAME, messages=user(QUESTION), max_tokens=24, temperature=0, stop=given
        )
        assert answer.choices[0].message.content == before and answer.choices[0].finish_reason == "stop"
    message = claude.messages.create(
        model=NAME, messages=user(QUESTION), max_tokens=24, stop_sequences=["~~~~", stop]
    )
    assert message.content[0].text == before
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


def test_completions(gpt: Any, loaded: Any) -> None:
    model, tokenizer = loaded
    expected = list(stream_generate(model, tokenizer, QUESTION, 12, layout="plain"))
    text, reason = "".join(response.text for response in expected), expected[-1].finish_reason
    ids = tokenizer.encode(QUESTION)
    for prompt in (QUESTION, [QUESTION], ids):
        answer = gpt.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0, logprobs=2)
        assert answer.choices[0].text == text and answer.choices[0].finish_reason == reason
    assert len(answer.choices[0].logprobs.tokens) == len(expected)
    chunks = list(gpt.completions.create(model=NAME, prompt=QUESTION, max_tokens=12, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_log_probabilities_are_the_model_s(gpt: Any, loaded: Any) -> None:
    model, tokenizer = loaded
    prompt = chat_prompt(tokenizer, QUESTION)
    expected = list(stream_generate(model, tokenizer, prompt, 8, layout="plain"))
    answer = gpt.chat.completions.create(
        model=NAME, messages=user(QUESTION), max_tokens=8, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs.content
    assert len(found) == len(expected)
    for token, response in zip(found, expected, strict=True):
        logprobs = response.logprobs
        assert token.logprob == pytest.approx(float(logprobs[response.token]), abs=1e-3)
        assert token.bytes == (None if "\ufffd" in token.token else list(token.token.encode()))
        best = mx.sort(logprobs)[-3:][::-1].tolist()
        assert [entry.logprob for entry in token.top_logprobs] == pytest.approx(best, abs=1e-3)
    streamed = list(
        gpt.chat.completions.create(
            model=NAME, messages=user(QUESTION), max_tokens=8, logprobs=True, stream=True
        )
    )
    tokens = [
        entry
        for chunk in streamed
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in tokens] == [token.token for token in found]


def test_usage_in_a_stream(gpt: Any) -> None:
    chunks = list(
        gpt.chat.completions.create(
            model=NAME, messages=user("a"), max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_json_schema(gpt: Any, claude: Any, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    asked = {"model": NAME, "messages": user(QUESTION), "max_tokens": 400}
    answer = gpt.chat.completions.create(**asked, response_format=form, seed=3, temperature=temperature)
    assert answer.choices[0].finish_reason == "stop"
    value = json.loads(answer.choices[0].message.content)
    assert value["colour"] in ("red", "blue") and value["count"] <= 99 and len(value) == 2
    sampling = {"seed": 3, "temperature": temperature}  # the client's newest version has no temperature
    message = claude.messages.create(
        **asked, output_config={"format": {"type": "json_schema", "schema": SCHEMA}}, extra_body=sampling
    )
    assert message.content[0].text == answer.choices[0].message.content


def test_anthropic(claude: Any, loaded: Any) -> None:
    text = right(loaded, 20)
    asked = {"model": NAME, "messages": user(QUESTION), "max_tokens": 20}
    message = claude.messages.create(**asked)
    assert message.content[0].text == text and message.role == "assistant"
    assert message.stop_reason in ("max_tokens", "end_turn") and message.mtp["lossless"] is True
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == text
        final = stream.get_final_message()
    assert final.content[0].text == text and final.stop_reason == message.stop_reason
    assert final.usage.output_tokens == message.usage.output_tokens
    parts = [{"type": "text", "text": QUESTION[:5]}, {"type": "text", "text": QUESTION[5:]}]
    again = claude.messages.create(**{**asked, "messages": [{"role": "user", "content": parts}]})
    assert again.content[0].text == text
    counted = claude.messages.count_tokens(model=NAME, messages=user(QUESTION))
    assert counted.input_tokens == len(chat_prompt(loaded[1], QUESTION))


def test_a_conversation_goes_on_from_its_cache(gpt: Any, claude: Any, loaded: Any) -> None:
    """System message and turns; the prompt's beginning is not run again, and the text is that without a cache."""
    model, tokenizer = loaded
    messages = [{"role": "system", "content": "Be brief and kind, always."}, *user(QUESTION)]
    reused = []
    for _ in range(3):
        answer = gpt.chat.completions.create(model=NAME, messages=messages, max_tokens=10, temperature=0)
        ids = chat_ids(tokenizer, messages)
        text = answer.choices[0].message.content
        assert text == generate(model, tokenizer, ids, 10, layout="plain")
        reused.append(answer.usage.prompt_tokens_details.cached_tokens)
        messages += [{"role": "assistant", "content": text}, *user("the dog and")]
    assert reused[2] > reused[1] > 20
    message = claude.messages.create(
        model=NAME, system="Be brief and kind, always.", messages=user(QUESTION), max_tokens=10
    )
    assert message.usage.cache_read_input_tokens > 20


def test_models(gpt: Any) -> None:
    assert [model.id for model in gpt.models.list()] == [NAME] and gpt.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="serves the model 'tiny'"):
        gpt.models.retrieve("gpt-9")
    # In a request, any name stands for the one model that runs.
    answer = gpt.chat.completions.create(model="gpt-9", messages=user("a"), max_tokens=2)
    assert answer.model == NAME


def test_names_of_models_can_be_strict(root: Path) -> None:
    with serving(root, strict_model=True) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError, match="serves the model 'tiny'"):
                client.chat.completions.create(model="gpt-9", messages=user("a"))
            client.chat.completions.create(model="default", messages=user("a"), max_tokens=1)


def test_errors_reach_the_clients_as_theirs(gpt: Any, claude: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="logit_bias has the token id 300"):
        gpt.chat.completions.create(model=NAME, messages=user("a"), logit_bias={"300": 1})
    with pytest.raises(openai.BadRequestError, match="temperature is 7.5e-05"):
        gpt.chat.completions.create(model=NAME, messages=user("a"), temperature=7.5e-5)
    tools = [{"name": "x", "description": "y", "input_schema": {"type": "object"}}]
    with pytest.raises(anthropic.BadRequestError, match="this model cannot call tools"):
        claude.messages.create(model=NAME, messages=user("a"), max_tokens=5, tools=tools)
