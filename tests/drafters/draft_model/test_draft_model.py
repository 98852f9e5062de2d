"""Proves that any model of the same vocabulary drafts, that the text stays the same, and that its cache holds it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from mtp_mlx.api import generate, load
from mtp_mlx.cli import main
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import mtp_generate_step, speculative_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import ChainPolicy, Policy
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.draft_model.draft import DraftModelDrafter, scratch
from mtp_mlx.drafters.draft_model.loading import prepare
from mtp_mlx.drafters.draft_model.options import DraftModelLoading
from mtp_mlx.drafters.draft_model.source import DraftModel
from mtp_mlx.drafters.registry import LoadContext
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.planning.choose import settled_layout
from mtp_mlx.serve.batch_plan import BatchDrafting, BatchPlan
from tests.drafters.heads.blocks import verified_block
from tests.drafters.heads.test_loop import SometimesChain
from tests.serve.test_batch import RELAXED, Text, check, expected, texts, together
from tests.tiny import VOCABULARY, save_tiny, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
KINDS = ["llama", "gemma3_text", "qwen3_next", "nemotron_h", "rwkv7"]  # every kind of cache


@lru_cache(maxsize=16)
def pair(target: str, drafting: str, seed: int) -> AttachedModel:
    """A tiny target with a tiny random draft model."""
    return attach(tiny_model(target, seed=3), DraftModel(tiny_model(drafting, seed=seed), VOCABULARY, 4))


def run(model: AttachedModel, policy: Any, stats: DecodeStats | None = None, **options: Any) -> list[int]:
    """Ids of a generation."""
    steps = mtp_generate_step(PROMPT, model, policy=policy, stats=stats, **options)
    return [item.token for item in steps]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(["llama", "gemma2", "gemma3_text", "qwen3_next"]),
    st.sampled_from(KINDS),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.7, 1.3]),
    st.sampled_from([1.0, 1.3]),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_same_text(
    target: str, drafting: str, drafts: int, temperature: float, penalty: float, uneven: bool, seed: int
) -> None:
    """The law of the package, with a draft model that knows nothing."""
    model = pair(target, drafting, 7)
    sampling = SamplingConfig(temperature=temperature, seed=seed, repetition_penalty=penalty)
    plain = run(model, None, max_tokens=24, sampling=sampling)
    policy = SometimesChain(drafts) if uneven else ChainPolicy(drafts)
    assert run(model, policy, max_tokens=24, sampling=sampling) == plain


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_drafts_for_itself_is_right(name: str, temperature: float) -> None:
    """The same noise at the same positions: every draft is the target's own token."""
    model, stats = pair(name, name, 3), DecodeStats()
    sampling = SamplingConfig(temperature=temperature, seed=11)
    found = run(model, ChainPolicy(4), stats, max_tokens=31, sampling=sampling)
    assert found == run(model, None, max_tokens=31, sampling=sampling)
    assert stats.acceptance == [1.0] * 4 and stats.drafted_by == {"draft-model": 24}
    assert stats.layouts["4/4 draft-model"] == 6


@pytest.mark.parametrize("name", KINDS)
def test_drafts_are_those_of_a_fresh_model(name: str) -> None:
    """Whatever was accepted or rejected before, the draft model goes on from the committed text, and no other."""
    drafting, rng = tiny_model(name, seed=5), np.random.default_rng(1)
    drafter, tokens = DraftModelDrafter(drafting, Picker(), VOCABULARY, VOCABULARY), list(PROMPT)
    drafter.catch_up(tokens)
    for accepted, drafts, count in [(0, 0, 3), (2, 3, 4), (0, 4, 1), (4, 4, 4), (1, 2, 4)]:
        block = rng.integers(0, VOCABULARY, drafts + 1).tolist()
        picks = mx.array([*block[:accepted], int(rng.integers(0, VOCABULARY)), *[0] * (drafts - accepted)])
        states = mx.zeros((1, drafts + 1, 4))
        seen = verified_block(states, picks, accepted, 0, tokens, count)
        fresh = drafter.propose(seen)
        tokens = [*tokens, *picks.tolist()[: accepted + 1]]  # type: ignore[misc]
        drafter.commit(accepted)
        expected: list[int] = []
        for _ in range(count):
            logits = drafting(mx.array([[*tokens, *expected]]))[0, -1]
            expected.append(int(mx.argmax(logits).item()))
        assert fresh.ids.tolist() == expected


@pytest.mark.parametrize("name", KINDS)
def test_a_scratch_cache_leaves_the_other_as_it_is(name: str) -> None:
    """What a pass on the copy writes is not seen by one on the original."""
    model = tiny_model(name, seed=5)
    cache = make_prompt_cache(model)
    model(mx.array([PROMPT]), cache=cache)
    mx.eval([layer.state for layer in cache])
    for _ in range(3):
        twin = [scratch(layer) for layer in cache]
        for token in (8, 9, 10, 11, 12, 13):
            mx.eval(model(mx.array([[token]]), cache=twin))
    found = model(mx.array([[7]]), cache=cache)[0, -1]
    expected = model(mx.array([[*PROMPT, 7]]))[0, -1]
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-4)


def test_padded_ids_are_never_drafted() -> None:
    """The draft model's embedding has more rows than the target's: those ids have no meaning here."""
    wide = tiny_model("llama", seed=3, vocab_size=VOCABULARY + 64)
    model = attach(tiny_model("llama", seed=3), DraftModel(wide, VOCABULARY, 4))
    session = Session(
        model, Picker(), PROMPT, model.make_cache(), CacheSettings(), lambda start: opened(model, start)
    )
    session.prefill()
    for _ in range(12):
        fresh = speculative_step(session, Layout.chained(0, 4), []).fresh
        assert all(token < VOCABULARY for token in fresh.tokens)


def opened(model: AttachedModel, start: int) -> Any:
    """The drafter of a greedy generation."""
    assert isinstance(model.speculator, DraftModel)
    return model.speculator.open(model, Picker(), 4, start)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", KINDS[:3])
def test_a_reused_cache_goes_on_with_the_same_text(name: str, known: bool) -> None:
    """A draft model that is told the prefix is as right as ever; one that is not says so."""
    model, stats = pair("llama", "llama", 3) if name == "llama" else pair(name, name, 3), DecodeStats()
    cache = model.make_cache()
    first = run(model, ChainPolicy(3), max_tokens=5, prompt_cache=cache)
    options: dict[str, Any] = {"prefix": [*PROMPT, *first]} if known else {}
    steps = mtp_generate_step(
        [7, 8], model, policy=ChainPolicy(3), prompt_cache=cache, max_tokens=9, stats=stats, **options
    )
    found = [item.token for item in steps]
    whole = mtp_generate_step([*PROMPT, *first, 7, 8], model, max_tokens=9)
    assert found == [item.token for item in whole]
    assert (set(stats.acceptance) <= {1.0, None}) == known
    assert any("has not read" in note for note in stats.fallbacks) != known


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_draft_model_that_knows_fewer_ids(penalty: float) -> None:
    """Padding that only the target has may stand in the text; it is drafted never, and breaks nothing."""
    target = tiny_model("llama", seed=3, vocab_size=VOCABULARY + 64)
    model = attach(target, DraftModel(tiny_model("llama", seed=4), VOCABULARY + 64, 4))
    sampling = SamplingConfig(repetition_penalty=penalty)
    prompt = [3, 1, VOCABULARY + 60, 4]
    steps = mtp_generate_step(prompt, model, policy=ChainPolicy(4), max_tokens=20, sampling=sampling)
    plain = mtp_generate_step(prompt, model, max_tokens=20, sampling=sampling)
    assert [item.token for item in steps] == [item.token for item in plain]


def test_turns_of_a_conversation_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the draft model read in the turn before is not read again, also where the answer was cut short."""
    model = pair("llama", "llama", 3)
    cache, rows = model.make_cache(), []
    run_rows = DraftModelDrafter._run

    def counting(self: DraftModelDrafter, ids: mx.array, layers: list[Any]) -> mx.array:
        rows.append(ids.shape[1])
        return run_rows(self, ids, layers)

    monkeypatch.setattr(DraftModelDrafter, "_run", counting)
    steps = mtp_generate_step(PROMPT * 8, model, policy=ChainPolicy(3), prompt_cache=cache)
    told = [next(steps).token for _ in range(6)]
    steps.close()
    assert max(rows) >= len(PROMPT) * 8 - 1
    rows.clear()
    more = mtp_generate_step(
        [7, 8], model, policy=ChainPolicy(3), prompt_cache=cache, max_tokens=4, prefix=[*PROMPT * 8, *told]
    )
    assert len(list(more)) == 4 and max(rows) <= 8


@settings(RELAXED, max_examples=10)
@given(st.lists(texts(), min_size=2, max_size=4), st.integers(1, 4), st.booleans(), st.sampled_from([3, 7]))
def test_shared_passes(cases: list[Text], chain: int, lookup: bool, seed: int) -> None:
    """Several sequences in one pass, each with a cache of the draft model of its own."""
    model = pair("llama", "llama", seed)
    truths = [expected(model, text) for text in cases]
    known = [[token.token for token in truth] for truth in truths]
    drafting = BatchDrafting("linear", chain=chain, lookup=chain if lookup else 0, own="draft-model")
    policies: list[Policy] = [ChainPolicy(chain) for _ in cases]
    quiet = [replace(text, acceptance=None) for text in cases]
    check(model, together(model, quiet, BatchPlan(drafting), policies, known, lookup), truths)


# --- loading ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a smaller one of the same vocabulary, and one of another."""
    home = tmp_path_factory.mktemp("models")
    save_tiny(home / "model", "llama", seed=3)
    save_tiny(home / "small", "qwen3", seed=4, num_hidden_layers=1)
    save_tiny(home / "other", "llama", seed=3, vocab_size=300)
    return home


def test_load(folders: Path) -> None:
    """Named as in mlx-lm; a number that is given is drafted in every step, otherwise drafts are planned."""
    plain, tokenizer = load(str(folders / "model"), None)
    expected = generate(plain, tokenizer, "The sky is", 20, layout="plain")
    model, _ = load(str(folders / "model"), draft_model=str(folders / "small"), num_draft_tokens=2)
    stats = DecodeStats()
    assert generate(model, tokenizer, "The sky is", 20, stats=stats) == expected
    assert set(stats.layouts) <= {"0/2 draft-model", "2/2 draft-model", "1/2 draft-model"}
    planned, _ = load(str(folders / "model"), draft_model=str(folders / "small"))
    assert (settled_layout(model, "auto"), settled_layout(planned, "auto")) == ("linear", "auto")
    assert planned.most_drafts == 3 and settled_layout(model, "auto", lookup=True) == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_model": "other"}, "has another vocabulary (300 tokens, the model has 157"),
        ({"draft_model": "nowhere"}, "no model"),
        ({"num_draft_tokens": 2}, "name one with `draft_model`"),
        ({"draft_model": "small", "adapter": "adapter"}, "is not an adapter folder"),
        ({"draft_modell": "small"}, "`load` has no argument `draft_modell`"),
    ],
)
def test_what_is_refused(folders: Path, options: dict[str, Any], message: str) -> None:
    places = {name: str(folders / value) for name, value in options.items() if isinstance(value, str)}
    with pytest.raises(MTPError) as caught:
        load(str(folders / "model"), **{**options, **places})
    assert message in str(caught.value)


def test_an_adapter_that_was_named_is_not_dropped_in_silence(folders: Path) -> None:
    model = tiny_model("llama", seed=3)
    named, found = (LoadContext(model, None, adapter_named=named) for named in (True, False))
    options = DraftModelLoading(str(folders / "small"))
    with pytest.raises(MTPError, match="leave `adapter` or `draft_model` out"):
        prepare(DraftModel(model, VOCABULARY), options, named)
    with pytest.raises(AttributeError):  # goes on to compare tokenizers, of which there is none here
        prepare(DraftModel(model, VOCABULARY), options, found)


def test_command_line(folders: Path) -> None:
    """The model as its own draft model: every draft is accepted, and the text is the plain one."""
    model = str(folders / "model")
    common = ["generate", "-m", model, "-a", "none", "-p", "The sky", "-n", "21", "--json"]
    plain = CliRunner().invoke(main, [*common, "--layout", "plain"])
    drafted = CliRunner().invoke(main, [*common, "--draft-model", model, "--num-draft-tokens", "4"])
    assert plain.exit_code == drafted.exit_code == 0, drafted.output
    found = json.loads(drafted.stdout)
    assert found["tokens"] == json.loads(plain.stdout)["tokens"]
    assert found["layout"] == "linear" and set(found["acceptance"]) == {1.0}
    assert found["stats"]["drafted_by"] == found["stats"]["submitted_by"] != {}
    refused = CliRunner().invoke(main, [*common, "--num-draft-tokens", "4"])
    assert refused.exit_code == 2 and "name one with --draft-model" in refused.stderr


def test_every_process_goes_on_from_the_picks_of_process_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """A near tie may fall otherwise in another process: what the draft model reads must not."""
    drafter = DraftModelDrafter(tiny_model("llama", seed=5), Picker(), VOCABULARY, VOCABULARY)
    drafter.catch_up(list(PROMPT))
    told = mx.array([1, 50, 77, 70], dtype=mx.int32)  # one draft accepted, then 77
    monkeypatch.setattr("mtp_mlx.drafters.draft_model.draft.led", lambda peers, values: told)
    seen = verified_block(mx.zeros((1, 3, 4)), mx.array([50, 60, 70]), 2, 0, list(PROMPT), 2)
    drafter.propose(seen)
    assert drafter._read == [*PROMPT, 50, 77]
