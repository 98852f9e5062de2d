"""Proves that drafts of an assistant are those of an oracle over the whole text, and that the text is the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache

from mtp_mlx import generate, load
from mtp_mlx.convert.adapters.gemma4_assistant import fill_assistant
from mtp_mlx.convert.heads import take
from mtp_mlx.convert.heads.write import Base
from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import mtp_generate_step, speculative_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import ChainPolicy
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.distributed import Peers
from mtp_mlx.drafters.gemma4_assistant.source import Gemma4Assistant
from mtp_mlx.drafters.gemma4_assistant.weights import Assistant
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.sharded import shard
from mtp_mlx.serve.batch import why_not_batch
from tests.drafters.gemma4_assistant.assistants import TARGET, V, assistant_folder, tensors
from tests.drafters.gemma4_assistant.oracle import Oracle
from tests.tiny import save_tiny, tiny_config, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Listening(Picker):
    """Keeps the logits that drafts are picked from."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[np.ndarray] = []

    def _hear(self, logits: mx.array, columns: mx.array | None) -> None:
        whole = np.full(V, -np.inf)
        whole[slice(None) if columns is None else np.array(columns)] = np.array(logits[0])
        self.heard.append(whole)

    def pick_with_confidence(self, *at: Any) -> Any:
        self._hear(at[0], at[3])
        return super().pick_with_confidence(*at)

    def candidates(self, *at: Any) -> Any:
        self._hear(at[0], at[3])
        return super().candidates(*at)


def drafting(folder: Path, centroids: bool, position: str) -> tuple[AttachedModel, Oracle]:
    """The tiny model with a random assistant, and the oracle of both."""
    made = tensors(centroids)
    bare = tiny_model("gemma4_text", seed=3, **TARGET)
    checkpoint = open_checkpoint(assistant_folder(folder / "assistant", made))
    (folder / "adapter").mkdir()
    fill_assistant(folder / "adapter", checkpoint, Base.of("tiny", bare), bare)
    source, _ = load_folder(folder / "adapter", bare)
    source.look_from(position)
    back = {"state": 1, "token": 0}[position]
    return attach(bare, source), Oracle(made, tiny_model("gemma4_text", seed=3, **TARGET), back)


def layouts(right: list[int]) -> list[tuple[list[int], Layout]]:
    """Drafts to verify where the model goes on with `right`, and their layouts: all kinds of acceptance."""
    wrong = [(token + 1) % V for token in right]
    chains = [[], right[:3], [*right[:1], *wrong[1:3]], wrong[:2], right[:2]]
    tree, parents = [wrong[0], right[0], wrong[1], right[1], right[2]], (-1, -1, 1, 1, 3)
    wide = Layout(5, (0,) * 6, chain=2, parents=parents, width=3)
    return [
        *((chain, Layout.chained(len(chain), 3)) for chain in chains),
        (tree, wide),
        (wrong[:1], Layout.chained(1, 3)),
    ]


@pytest.mark.parametrize(("position", "centroids"), [("state", False), ("state", True), ("token", False)])
def test_logits_are_the_oracles_at_every_depth(tmp_path: Path, position: str, centroids: bool) -> None:
    """Beyond the window, after rejected drafts, behind a tree, and behind a prefix that came in a prompt cache."""
    model, oracle = drafting(tmp_path, centroids, position)
    plain = [one.token for one in mtp_generate_step(PROMPT, model, max_tokens=50)]
    cache, text = model.make_cache(), list(PROMPT)
    for _ in range(2):
        picker = Listening()
        prompt = text if len(text) == len(PROMPT) else text[-1:]
        session = Session(
            model,
            Picker(),
            prompt,
            cache,
            CacheSettings(),
            partial(model.speculator.open, model, picker, 3),
        )
        session.prefill()
        for number in range(7):
            done = len(text) - len(PROMPT)
            drafts, layout = layouts(plain[done:])[number]
            picker.heard.clear()
            result = speculative_step(session, layout, drafts)
            text += result.tokens
            assert text == PROMPT + plain[: len(text) - len(PROMPT)]
            firsts = [token for token, first in zip(result.fresh.tokens, result.fresh.first_choices) if first]
            wanted = oracle.logits(text, firsts[: len(picker.heard) - 1])
            assert len(picker.heard) == layout.chain and result.fresh.tokens
            for found, expected in zip(picker.heard, wanted, strict=True):
                np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
                assert np.isneginf(found).sum() == (110 if centroids else 0)
        session.settle(len(session.tokens) - 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder, with the language model inside a multimodal one as in those of the hub, and an assistant's."""
    folder, text = tmp_path_factory.mktemp("gemma"), tiny_config("gemma4_text", **TARGET)
    model = save_tiny(folder / "model", "gemma4", seed=3, text_config=text, vocab_size=V)
    return model, assistant_folder(folder / "assistant", tensors(centroids=True))


@pytest.fixture(scope="module")
def loaded(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The model with its assistant, as a user loads both; a random assistant is hardly ever right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTP_MLX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(take, "LEAST", 0.0)
        patch.setattr(take, "TOKENS", 6)
        yield load(str(folders[0]), heads=folders[1])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("layout", ["linear", "tree"])
def test_same_text(loaded: Any, folders: tuple[Path, Path], layout: Any, temperature: float) -> None:
    model, tokenizer = loaded
    assert isinstance(model.speculator, Gemma4Assistant) and model.speculator.name == "assistant"
    sampling, stats = SamplingConfig(temperature=temperature, seed=5, repetition_penalty=1.1), DecodeStats()
    found = generate(
        model, tokenizer, PROMPT, 40, sampling=sampling, layout=layout, drafter="assistant", stats=stats
    )
    plain, _ = load(str(folders[0]), None)
    assert found == generate(plain, tokenizer, PROMPT, 40, sampling=sampling, layout="plain")
    assert stats.submitted_by["assistant"] > 20 and not stats.fallbacks


def test_drafts_take_the_targets_noise(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An assistant that has the model's own logits is always right, at a temperature too."""
    model, _ = loaded
    sampling, stats = SamplingConfig(temperature=0.8, seed=9), DecodeStats()
    plain = list(mtp_generate_step(PROMPT, model, max_tokens=30, sampling=sampling))
    known = mx.stack([*[mx.zeros((V,))] * len(PROMPT), *[one.logits for one in plain]])  # [position, V]
    depths = itertools.cycle([1, 2, 3])

    def knows(_: Any, embedding: mx.array, state: mx.array, seen: Any, position: mx.array) -> Any:
        return known[position + 1 + next(depths)][None], state  # looked at from the row before

    monkeypatch.setattr(Assistant, "__call__", knows)
    monkeypatch.setattr(Assistant, "logits", lambda _, state: (state, None))
    steps = mtp_generate_step(
        PROMPT, model, max_tokens=21, sampling=sampling, policy=ChainPolicy(3), stats=stats
    )
    assert [one.token for one in steps] == [one.token for one in plain[:21]]
    assert stats.acceptance == [1.0] * 3 and stats.drafted_by == {"assistant": 15}


def test_a_cache_that_cannot_be_read_is_refused_once(loaded: Any) -> None:
    model, _ = loaded
    cache = [
        RotatingKVCache(max_size=8, keep=4) if i == 1 else layer for i, layer in enumerate(model.make_cache())
    ]
    with pytest.raises(
        MTPError, match="cannot read the RotatingKVCache of layer 1: leave the `prompt_cache`"
    ):
        next(mtp_generate_step(PROMPT, model, policy=ChainPolicy(3), prompt_cache=cache))
    assert next(mtp_generate_step(PROMPT, model, prompt_cache=cache)).drafter == ""  # plainly, it can be used


def test_it_drafts_for_one_sequence_in_one_process(loaded: Any) -> None:
    model, _ = loaded
    assert why_not_batch(model) == "its drafter reads the keys and values of one sequence"
    with pytest.raises(MTPError, match="reads the keys and values of all heads"):
        shard(tiny_model("llama"), model.speculator, Peers())
