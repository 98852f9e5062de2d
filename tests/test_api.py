"""load, stream_generate and generate against mlx-lm's calls of the same names, through saved folders."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mtp_mlx import GenerationResponse, SamplingConfig, chat_prompt, generate, load, stream_generate
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import KnowingDrafter, drafting, random_adapter
from tests.tiny import VOCABULARY, save_tiny, tiny_model, tiny_tokenizer

LAYOUTS = ["plain", "linear", "quadratic", "tree", "auto"]
PROMPTS = ["The sky", "the dog and the fox", "def add(", "In the beginning", "a", "word word word word"]
EOS_CANDIDATES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `adapter` in it."""
    root = tmp_path_factory.mktemp("api")
    save_tiny(root / "model", "qwen3", seed=3)
    model = tiny_model("qwen3", seed=3)
    adapter = random_adapter(model)
    save_adapter(root / "adapter", adapter, mask_header(adapter.config, "tiny", base_fingerprint(model)))
    return root


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load(str(folder / "model"), folder / "adapter")


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[Any, Any]:
    """mlx-lm's own model and tokenizer."""
    return mlx_lm.load(str(folder / "model"))[:2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs measured by layout auto stay out of the user's cache."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path))


def theirs(plain: tuple[Any, Any], prompt: Any, max_tokens: int, **options: Any) -> list[Any]:
    return list(mlx_lm.stream_generate(plain[0], plain[1], prompt, max_tokens, **options))


def fields(responses: list[Any]) -> list[tuple[str, int, str | None, int, int]]:
    """What both packages' responses must agree on."""
    return [(r.text, r.token, r.finish_reason, r.prompt_tokens, r.generation_tokens) for r in responses]


def knowing(plain: tuple[Any, Any], prompt: str, probability: float = 0.9) -> KnowingDrafter:
    """A drafter that is mostly right about what follows `prompt`, whatever eos is."""
    eos, plain[1].eos_token_ids = plain[1].eos_token_ids, set()
    try:
        truth = [response.token for response in theirs(plain, prompt, 60)]
    finally:
        plain[1].eos_token_ids = eos
    return KnowingDrafter(truth, len(plain[1].encode(prompt)), probability, seed=len(prompt))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_responses_equal_mlx_lm_s(loaded: Any, plain: Any, layout: str) -> None:
    model, tokenizer = loaded
    for prompt in PROMPTS:
        with drafting(knowing(plain, prompt)):
            ours = list(stream_generate(model, tokenizer, prompt, 40, layout=layout))
        assert fields(ours) == fields(theirs(plain, prompt, 40))
        assert generate(model, tokenizer, prompt, 40, layout=layout) == "".join(r.text for r in ours)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eos_inside_an_accepted_block(loaded: Any, plain: Any, layout: str) -> None:
    """Every token that the model writes takes a turn as the end of text."""
    model, tokenizer = loaded
    inside = 0
    for prompt in PROMPTS[:3]:
        written = sorted({r.token for r in theirs(plain, prompt, 24)})[:EOS_CANDIDATES]
        drafter = knowing(plain, prompt, 1.0)
        eos = tokenizer.eos_token_ids, plain[1].eos_token_ids
        try:
            for token in written:
                tokenizer.eos_token_ids = plain[1].eos_token_ids = {token}
                with drafting(drafter):
                    ours = list(stream_generate(model, tokenizer, prompt, 24, layout=layout))
                assert fields(ours) == fields(theirs(plain, prompt, 24))
                assert ours[-1].finish_reason == "stop" and ours[-1].token == token
                inside += ours[-1].stats.tokens > ours[-1].generation_tokens
        finally:
            tokenizer.eos_token_ids, plain[1].eos_token_ids = eos
    assert inside > 3 or layout in ("plain", "auto"), "eos must often be followed by tokens of its block"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stop_strings(loaded: Any, plain: Any, layout: str) -> None:
    """Any piece of the text, whatever token borders it spans, ends the text before it."""
    model, tokenizer = loaded
    for prompt in PROMPTS[:3]:
        full = "".join(r.text for r in theirs(plain, prompt, 40))
        for start in range(1, len(full) - 7, 11):
            stop = full[start : start + 6]
            with drafting(knowing(plain, prompt, 1.0)):
                ours = list(stream_generate(model, tokenizer, prompt, 40, layout=layout, stop=["~~~", stop]))
            assert "".join(r.text for r in ours) == full[: full.find(stop)]
            assert ours[-1].finish_reason == "stop"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_max_tokens_is_exact(loaded: Any, plain: Any, layout: str, count: int) -> None:
    with drafting(knowing(plain, "The sky", 1.0)):
        ours = list(stream_generate(*loaded, "The sky", count, layout=layout))
    assert len(ours) == count and ours[-1].finish_reason == "length"
    assert fields(ours) == fields(theirs(plain, "The sky", count))


def test_without_a_limit_the_text_goes_on(loaded: Any) -> None:
    steps = stream_generate(*loaded, "The sky", -1)
    assert len([next(steps) for _ in range(30)]) == 30
    steps.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversation_on_one_cache(loaded: Any, plain: Any, layout: str) -> None:
    """Turns of closed and of finished generations; the cache stays equal to mlx-lm's."""
    model, tokenizer = loaded
    own, other = model.make_cache(), mlx_lm.models.cache.make_prompt_cache(plain[0])
    for turn, prompt in enumerate(PROMPTS):
        count = 3 + 2 * turn
        ours = stream_generate(model, tokenizer, prompt, 40, layout=layout, prompt_cache=own)
        expected = mlx_lm.stream_generate(plain[0], plain[1], prompt, 40, prompt_cache=other)
        if turn % 3 == 2:
            assert fields(list(ours)) == fields(list(expected))
        else:
            assert fields([next(ours) for _ in range(count)]) == fields(
                [next(expected) for _ in range(count)]
            )
            ours.close()
            expected.close()
        assert [layer.offset for layer in own] == [layer.offset for layer in other]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_background_thread(folder: Path, plain: Any, layout: str) -> None:
    """Loaded here, written there; and the cache made there goes on here."""
    model, tokenizer = load(str(folder / "model"), folder / "adapter")
    cache, results = model.make_cache(), []

    def work() -> None:
        try:
            results.append(generate(model, tokenizer, "The sky", 20, layout=layout, prompt_cache=cache))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    other = mlx_lm.models.cache.make_prompt_cache(plain[0])
    for prompt, result in [("The sky", results[0]), ("the dog", None)]:
        expected = "".join(r.text for r in theirs(plain, prompt, 20, prompt_cache=other))
        if result is None:
            result = generate(model, tokenizer, prompt, 20, layout=layout, prompt_cache=cache)
        assert result == expected


def test_two_generations_interleaved(loaded: Any, plain: Any) -> None:
    model, tokenizer = loaded
    streams: list[Iterator[GenerationResponse]] = [
        stream_generate(model, tokenizer, "The sky", 30, layout="quadratic"),
        stream_generate(model, tokenizer, "the dog and", 30, layout="linear"),
    ]
    texts = ["", ""]
    for _ in range(30):
        for index, stream in enumerate(streams):
            response = next(stream, None)
            texts[index] += response.text if response else ""
    assert texts == ["".join(r.text for r in theirs(plain, p, 30)) for p in ("The sky", "the dog and")]


def test_sampled_text_is_the_same_in_every_layout(loaded: Any) -> None:
    sampling = SamplingConfig(temperature=0.9, top_p=0.95, seed=11)
    texts = {generate(*loaded, "The sky", 40, sampling=sampling, layout=layout) for layout in LAYOUTS}
    other = SamplingConfig(temperature=0.9, top_p=0.95, seed=12)
    assert len(texts) == 1 and generate(*loaded, "The sky", 40, sampling=other) not in texts


def test_prompt_forms(loaded: Any) -> None:
    ids = chat_prompt(loaded[1], "The sky", system="Be kind.")
    texts = {generate(*loaded, prompt, 9) for prompt in (ids, tuple(ids), mx.array(ids), np.array(ids))}
    assert len(texts) == 1


def test_response_fields(loaded: Any) -> None:
    stats = DecodeStats()
    responses = list(stream_generate(*loaded, "The sky", 12, layout="quadratic", slots=2, stats=stats))
    last = responses[-1]
    assert last.lossless and last.stats is stats and last.prompt_tps > 0 and last.generation_tps > 0
    assert last.logits.shape == (VOCABULARY,) and last.peak_memory >= 0
    assert int(mx.argmax(last.logprobs).item()) == last.token
    assert abs(float(mx.exp(last.logprobs).sum().item()) - 1) < 1e-4
    assert all((response.depth > 0) == response.from_draft for response in responses)


def test_lookup_that_cannot_run_is_counted(loaded: Any) -> None:
    stats = DecodeStats()
    generate(*loaded, "The sky", 3, layout="plain", lookup=True, stats=stats)
    assert sum(stats.fallbacks.values()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"layout": "cubic"}, "unknown layout 'cubic'"),
        ({"slots": 9}, "drafts per step must be 1 to 4"),
    ],
)
def test_bad_options(loaded: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MTPError, match=message):
        generate(*loaded, "The sky", **options)


def test_what_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "qwen3", seed=4)
    with pytest.raises(MTPError, match="fingerprint"):
        load(str(other), folder / "adapter")
    with pytest.raises(MTPError, match="not an adapter folder"):
        load(str(other), tmp_path)
    with pytest.raises(MTPError, match="no model"):
        load(str(tmp_path / "missing"))
    (other / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(MTPError, match="could not be loaded"):
        load(str(other))
    model, tokenizer = load(str(folder / "model"), None)
    with pytest.raises(MTPError, match="needs an adapter"):
        generate(model, tokenizer, "a", layout="linear")


def test_a_tokenizer_without_wrapper(loaded: Any) -> None:
    inner = tiny_tokenizer()._tokenizer
    assert len(list(stream_generate(loaded[0], inner, "The sky", 5))) == 5


def test_a_prompt_longer_than_the_context_is_noted() -> None:
    model, tokenizer = attach(tiny_model("llama", max_position_embeddings=8)), tiny_tokenizer()
    for length, noted in ((8, False), (9, True)):
        stats = DecodeStats()
        generate(model, tokenizer, [5] * length, 1, layout="plain", stats=stats)
        assert any("the model's context is 8" in note for note in stats.notes) == noted
        assert not stats.fallbacks, "nothing falls back"
