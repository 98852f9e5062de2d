"""Proves that `batch_generate` writes the texts that mlx-lm's function and `generate` write for each prompt alone:
any layout, lengths, ends, sampling and caches; and that models whose passes cannot be shared say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mtp_mlx import MTPError, SamplingConfig, batch_generate, load, stream_generate
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.model.attach import attach
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import random_adapter
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

PROMPTS = ["The sky", "the dog and the fox jumps over", "def add(", "a"]
NEAR = 1e-3  # log-probabilities in padded passes differ by rounding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batch")
    save_tiny(root / "model", "qwen3", seed=3)
    model = tiny_model("qwen3", seed=3)
    adapter = random_adapter(model)
    save_adapter(root / "adapter", adapter, mask_header(adapter.config, "tiny", base_fingerprint(model)))
    return root


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load(str(folder / "model"), folder / "adapter")


@pytest.fixture(scope="module")
def bare(folder: Path) -> tuple[Any, Any]:
    return mlx_lm.load(str(folder / "model"))[:2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path))


def ids_of(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("layout", ["plain", "linear", "quadratic", "auto"])
@pytest.mark.parametrize("at_once", [1, 2, 32])
def test_as_mlx_lm_s(loaded: Any, bare: Any, layout: Any, at_once: int) -> None:
    """Greedy texts of different lengths, one of which the model ends itself."""
    model, tokenizer = loaded
    prompts, lengths = ids_of(tokenizer), [9, 1, 14, 12]
    plain = [r.token for r in mlx_lm.stream_generate(*bare, prompts[3], 12)]
    end = plain[5]
    more = {"return_token_ids": True, "return_logprobs": True, "return_prompt_caches": True}
    before = [set(each._eos_token_ids) for each in (tokenizer, bare[1])]
    for each in (tokenizer, bare[1]):
        each._eos_token_ids.add(end)
    try:
        theirs = mlx_lm.batch_generate(*bare, prompts, max_tokens=lengths, **more)
        ours = batch_generate(
            *loaded, prompts, max_tokens=lengths, layout=layout, completion_batch_size=at_once, **more
        )
        alone = [
            [r.token for r in stream_generate(*loaded, prompt, length, layout="plain") if r.token != end]
            for prompt, length in zip(prompts, lengths)
        ]
    finally:
        for each, ends in zip((tokenizer, bare[1]), before):
            each._eos_token_ids = ends
    assert ours.token_ids == theirs.token_ids == alone and ours.texts == theirs.texts
    assert len(ours.token_ids[3]) < 12, "the test needs a text that ends by itself"
    for own, other in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert np.allclose(own, other, atol=NEAR)
    for own, other in zip(ours.caches, theirs.caches, strict=True):
        for layer, its in zip(own, other, strict=True):
            assert layer.offset == its.offset
            keys = [np.array(each.keys[..., : each.offset, :]) for each in (layer, its)]
            assert np.allclose(*keys, atol=NEAR * 10)
    stats = ours.stats
    assert stats.prompt_tokens == sum(map(len, prompts)) and len(stats.texts) == len(prompts)
    assert stats.generation_tokens == theirs.stats.generation_tokens > 0 < stats.generation_tps
    if layout == "quadratic" and at_once == 32:
        assert stats.generation_steps < sum(map(len, ours.token_ids))  # passes are shared


def test_sampled_texts_are_those_of_each_prompt_alone(loaded: Any) -> None:
    samplings = [SamplingConfig(temperature=0.9, seed=seed, repetition_penalty=1.2) for seed in range(4)]
    given = {"max_tokens": 10, "sampling": samplings, "layout": "quadratic"}
    found = batch_generate(*loaded, PROMPTS, **given, return_token_ids=True)
    for ids, prompt, sampling in zip(found.token_ids, PROMPTS, samplings, strict=True):
        alone = stream_generate(*loaded, prompt, 10, sampling=sampling, layout="plain")
        assert ids == [r.token for r in alone if r.token not in loaded[1].eos_token_ids]
    assert found.logprobs is found.caches is None
    same = batch_generate(*loaded, ["a", "a"], max_tokens=10, sampling=samplings[0], layout="linear").texts
    assert same[0] == same[1]


def test_prompt_caches_are_gone_on_from_and_not_changed(loaded: Any) -> None:
    model, tokenizer = loaded
    prompts = ids_of(tokenizer)
    first = batch_generate(*loaded, prompts, max_tokens=5, return_prompt_caches=True, return_token_ids=True)
    states = [[layer.offset for layer in cache] for cache in first.caches]
    for layout in ("plain", "quadratic"):
        on = batch_generate(
            *loaded, prompts, first.caches, max_tokens=6, layout=layout, return_token_ids=True
        )
        for prompt, before, after in zip(prompts, first.token_ids, on.token_ids, strict=True):
            whole = [*prompt, *before, *prompt]
            assert after == [r.token for r in stream_generate(*loaded, whole, 6, layout="plain")]
    assert [[layer.offset for layer in cache] for cache in first.caches] == states
    some = batch_generate(*loaded, prompts[:2], [first.caches[0], None], max_tokens=6, return_token_ids=True)
    assert some.token_ids[0] == on.token_ids[0]


def test_a_quantised_prompt_cache_is_gone_on_from_alone(bare: Any) -> None:
    plain = tiny_model("llama", seed=3, hidden_size=128, head_dim=32)
    model, tokenizer = attach(plain), tiny_tokenizer()
    cache = make_prompt_cache(plain)
    plain(mx.array([[5, 9, 2]]), cache=cache)
    cache = [layer.to_quantized(group_size=32, bits=8) for layer in cache]
    found = batch_generate(
        model, tokenizer, [[7], [7, 8], [9]], [None, cache, None], max_tokens=4, layout="plain"
    )
    assert [bool(stats.fallbacks) for stats in found.stats.texts] == [False, True, False]


def test_models_whose_passes_cannot_be_shared(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = attach(tiny_model("gemma3_text", seed=3)), tiny_tokenizer()
    found = batch_generate(model, tokenizer, PROMPTS, max_tokens=8, return_token_ids=True)
    for ids, prompt in zip(found.token_ids, PROMPTS, strict=True):
        assert ids == [r.token for r in stream_generate(model, tokenizer, prompt, 8, layout="plain")]
    assert all("one text after the other" in str(stats.fallbacks) for stats in found.stats.texts)
    assert caplog.text.count("one text after the other") == 1


def test_verbose(loaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    batch_generate(*loaded, PROMPTS, max_tokens=3, verbose=True, layout="plain")
    said = capsys.readouterr().out
    assert "Finished processing 0/4 ...\r" in said and "Finished processing 4/4 ...\n" in said
    assert "Prompt: " in said and "Generation: 12 tokens" in said and "Peak memory" in said
    assert batch_generate(*loaded, []).texts == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("a", {}, "`prompts` must be a list"),
        (["a", []], {}, r"`prompts`\[1\] is empty"),
        ([[1], [99999]], {}, r"`prompts`\[1\] has the token id 99999"),
        (["a", "b"], {"max_tokens": [1]}, "`max_tokens` has 1 values for 2 prompts"),
        (["a"], {"max_tokens": 0}, "`max_tokens` must be at least 1"),
        (["a", "b"], {"sampling": [SamplingConfig()]}, "`sampling` has 1 values"),
        (["a", "b"], {"prompt_caches": []}, "`prompt_caches` has 0 values"),
        (["a"], {"sampler": max}, "`sampler` cannot be used"),
        (["a"], {"draftz": 2}, "unknown argument `draftz`: did you mean `drafts`"),
        (["a"], {"completion_batch_size": 0}, "`completion_batch_size` must be at least 1"),
        (["a", "b"], {"drafter": "heads", "layout": "linear"}, "heads"),
    ],
)
def test_mistakes(loaded: Any, prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MTPError, match=message):
        batch_generate(*loaded, prompts, **options)
