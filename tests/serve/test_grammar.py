"""Text under a JSON schema is that of plain constrained decoding, whatever drafts: against a brute-force search that
asks a fresh matcher about every token in order of its logit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mtp_mlx.api import load
from mtp_mlx.decode.constraint import Constraint
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from tests.decode.fakes import KnowingDrafter, drafting
from tests.serve.running import VOCABULARY, save_model
from tests.tiny import tiny_model

llguidance = pytest.importorskip("llguidance")
from mtp_mlx.serve.grammar import AfterThinking, Grammars  # noqa: E402

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer", "maximum": 999}}, "required": ["a"]},
    {"enum": ["red", "blue", "green"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "string", "maxLength": 6},
]
LIMIT = 30


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Grammars, set[int]]:
    """Attached model, tokenizer, grammars, end-of-text ids."""
    root: Path = save_model(tmp_path_factory.mktemp("grammar"))
    model, tokenizer = load(str(root / "model"), root / "adapter")
    eos = set(tokenizer.eos_token_ids)
    return model, tokenizer, Grammars(tokenizer._tokenizer, model.vocab_size, sorted(eos)), eos


def brute_force(loaded: Any, grammar: str, prompt: list[int], sampling: SamplingConfig) -> list[int]:
    """Plain decoding, one forward per token on an untouched model; tokens tried by falling score."""
    _, _, grammars, eos = loaded
    bare, picker = tiny_model("qwen3", seed=3, vocab_size=VOCABULARY), Picker(sampling)
    tokens: list[int] = []
    while len(tokens) < LIMIT and not (tokens and tokens[-1] in eos):
        logits = bare(mx.array([[*prompt, *tokens]]))[0, -1:]
        position = mx.array([len(prompt) + len(tokens)])
        forbidden = np.zeros((1, VOCABULARY), dtype=np.float32)
        fresh = llguidance.LLMatcher(grammars._tokenizer, grammar)
        assert fresh.consume_tokens(tokens) or not tokens
        while True:
            pick = int(picker.pick(logits + mx.array(forbidden), position).item())
            if pick in eos if fresh.is_stopped() else _in_mask(fresh, pick):
                break
            forbidden[0, pick] = -np.inf
        tokens.append(pick)
    return tokens


def _in_mask(matcher: Any, token: int) -> bool:
    """Where the text is forced, the library's mask has its own cut of it only: less than it would accept."""
    return bool(matcher.compute_bitmask()[token // 8] >> token % 8 & 1)


def constrained(loaded: Any, grammar: str, prompt: list[int], sampling: SamplingConfig, layout: str) -> Any:
    model, _, grammars, eos = loaded
    stats = DecodeStats()
    tokens: list[int] = []
    name: Any = layout
    for item in mtp_generate_step(
        prompt,
        model,
        max_tokens=LIMIT,
        sampling=sampling,
        policy=FixedPolicy(name, 0 if layout == "plain" else 3),
        constraint=grammars.start(grammar),
        stats=stats,
    ):
        tokens.append(item.token)
        if item.token in eos:
            break
    return tokens, stats


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(SCHEMAS),
    st.sampled_from([SamplingConfig(), SamplingConfig(temperature=0.9, seed=4)]),
    st.sampled_from(["plain", "linear", "quadratic"]),
    st.sampled_from([0.0, 0.7, 1.0]),
    st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=12),
)
@example(SCHEMAS[1], SamplingConfig(), "plain", 0.0, [3])  # a forced text that could be cut in two ways
def test_constrained_text(
    loaded: Any, schema: Any, sampling: SamplingConfig, layout: str, probability: float, prompt: list[int]
) -> None:
    grammar = loaded[2].from_schema(schema)
    truth = brute_force(loaded, grammar, prompt, sampling)
    with drafting(KnowingDrafter(truth, len(prompt), probability, seed=1)):
        found, _ = constrained(loaded, grammar, prompt, sampling, layout)
    assert found == truth
    if truth[-1] in loaded[3]:
        json.loads(loaded[1].decode(truth[:-1]))


def test_good_drafts_are_accepted(loaded: Any) -> None:
    grammar, prompt = loaded[2].from_schema(SCHEMAS[0]), [5, 6, 7]
    truth = brute_force(loaded, grammar, prompt, SamplingConfig())
    with drafting(KnowingDrafter(truth, len(prompt), 1.0, seed=1)):
        _, stats = constrained(loaded, grammar, prompt, SamplingConfig(), "quadratic")
    assert stats.steps < 0.5 * len(truth)


def test_masks_along_drafts_are_those_of_the_text_and_the_drafts(loaded: Any) -> None:
    """Row i equals the mask after committing the first i drafts; the state is as before afterwards."""
    grammars, tokenizer = loaded[2], loaded[1]
    grammar = grammars.from_schema(SCHEMAS[0])
    drafts = tokenizer.encode('{"a": 12}', add_special_tokens=False)
    along = grammars.start(grammar)
    rows = along.allowed(drafts)
    assert rows.shape == (1 + len(drafts), VOCABULARY)
    for count in range(1 + len(drafts)):
        fresh = grammars.start(grammar)
        fresh.commit(drafts[:count])
        assert (fresh.allowed([])[0] == rows[count]).all() and rows[count].any()
    assert (along.allowed([])[0] == rows[0]).all()


def test_rows_behind_a_refused_draft_and_the_end(loaded: Any) -> None:
    grammars, tokenizer, eos = loaded[2], loaded[1], loaded[3]
    constraint = grammars.start(grammars.from_schema(SCHEMAS[1]))
    refused = tokenizer.encode("x", add_special_tokens=False)
    rows = constraint.allowed([*refused, *refused])
    assert not rows[0].all() and rows[1:].all()
    constraint.commit(tokenizer.encode('"red"', add_special_tokens=False))
    assert set(np.flatnonzero(constraint.allowed([])[0])) == eos
    constraint.commit([next(iter(eos)), 5, 5])
    assert set(np.flatnonzero(constraint.allowed([5])[0])) == eos


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"type": "object", "properties": 5},
        {"$ref": "http://example.com/schema.json"},
        {"type": "object", "patternProperties": {"(": {}}},
    ],
)
def test_bad_schemas_are_refused(loaded: Any, schema: Any) -> None:
    with pytest.raises(MTPError, match="JSON schema cannot be used"):
        loaded[2].from_schema(schema)


def test_unverified_emission_is_refused(loaded: Any) -> None:
    constraint: Constraint = loaded[2].start(loaded[2].from_schema(SCHEMAS[0]))
    policy = FixedPolicy("linear", 3)
    with pytest.raises(MTPError, match="verified"):
        next(
            mtp_generate_step(
                [1], loaded[0], policy=policy, emission=Emission("static"), constraint=constraint
            )
        )


class Free:
    """A `Constraint` that allows the token numbered as many as there were before it."""

    def __init__(self) -> None:
        self.text: list[int] = []

    def allowed(self, drafts: list[int]) -> np.ndarray:
        rows = np.zeros((1 + len(drafts), 40), dtype=bool)
        for row in range(len(rows)):
            rows[row, len(self.text) + row] = True
        return rows

    def commit(self, tokens: list[int]) -> None:
        self.text += tokens


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2), max_size=16),
    cuts=st.lists(st.integers(0, 16), max_size=5),
    end=st.sampled_from([(2,), (1, 2), (1, 1, 2)]),
)
def test_nothing_is_forbidden_up_to_the_tag(tokens: list[int], cuts: list[int], end: tuple[int, ...]) -> None:
    """Every row of every step, however the text is cut: free up to the tag's last token, then the inner's."""
    found = [i + len(end) for i in range(len(tokens)) if tuple(tokens[i : i + len(end)]) == end]
    first = found[0] if found else len(tokens) + 1  # rows before this one are free
    inner = Free()
    after = AfterThinking(inner, end, 40)
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for begin, stop in zip(bounds, bounds[1:]):
        rows = after.allowed(tokens[begin:stop])
        for row, position in zip(rows, range(begin, stop + 1), strict=True):
            assert row.all() if position < first else row.tolist().index(True) == position - first
        after.commit(tokens[begin:stop])
    assert inner.text == tokens[first:]
