"""The text with Medusa's or Meta's heads is that of plain decoding, and what they draft rests on every earlier row.

Any kind of step follows any other: prompts in chunks, plain passes, short and long chains, and drafts of the text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mtp_mlx.decode.drafter import LazyDrafts, Verified
from mtp_mlx.decode.lookup import LookupDrafter
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import ChainPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.drafters.heads.medusa import MedusaDrafter, MedusaHead, MedusaHeads
from mtp_mlx.drafters.heads.mtp_head import block_like
from mtp_mlx.drafters.heads.parallel import ParallelDrafter, ParallelHead, ParallelHeads
from mtp_mlx.model.attach import AttachedModel, attach
from tests.decode.test_loop import Case, certified, plain_tokens
from tests.drafters.heads.blocks import verified_block
from tests.drafters.heads.test_loop import SometimesChain
from tests.tiny import VOCABULARY, tiny_model

HEADS = 3
DRAFT_IDS = mx.arange(0, VOCABULARY, 2, dtype=mx.int32)
EXAMPLES = 40
MODELS: dict[str, AttachedModel] = {}


def model_with(kind: str) -> AttachedModel:
    """A tiny llama with random heads; shared. "medusa, few ids": with a draft vocabulary."""
    if kind not in MODELS:
        model = tiny_model("llama", seed=3)
        rng = np.random.default_rng(5)
        heads: DraftHeads
        if kind.startswith("medusa"):
            convention = HeadConvention("test", "medusa", "", lm_head="own", output_norm="identity")
            made = [MedusaHead(2, 48, VOCABULARY) for _ in range(HEADS)]
            heads = MedusaHeads(made, convention, DRAFT_IDS if "few" in kind else None)
        else:
            convention = HeadConvention(
                "test", "parallel", "", "before-last-layer", "none", output_norm="trunk"
            )
            heads = ParallelHeads(
                [ParallelHead(block_like(model.model), 48) for _ in range(HEADS)], convention
            )
        heads.apply(lambda x: x + mx.array(0.2 * rng.normal(size=x.shape).astype(np.float32)))
        MODELS[kind] = attach(model, heads)
    return MODELS[kind]


class Knowing:
    """Mixed into a drafter: runs its heads, then drafts the true text, wrong at every fourth position."""

    truth: tuple[int, list[int]] = (0, [])

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter.propose`."""
        own = super().propose(verified)  # type: ignore[misc]
        start, tokens = self.truth
        known = [(t + (i % 4 == 3)) % VOCABULARY for i, t in enumerate([*tokens, *[0] * 32])]
        table = mx.array([0] * start + known, dtype=mx.int32)
        after = verified.position + 1 + mx.arange(len(own.ids))
        return LazyDrafts(table[mx.minimum(after, len(table) - 1)] + 0 * own.ids, own.confidences)


class KnowingMedusa(Knowing, MedusaDrafter):
    """Medusa's drafter with the truth."""


class KnowingParallel(Knowing, ParallelDrafter):
    """Meta's drafter with the truth."""


# Known drafts for both kinds of heads, whatever else is drawn.
ALWAYS = Case(
    architecture="llama",
    prompt=(3, 1, 4, 1, 5),
    max_tokens=18,
    layout="plain",
    slots=1,
    lookup=False,
    acceptance=None,
    prefill_step_size=8,
    kv_bits=None,
    quantized_kv_start=5000,
    sampling=SamplingConfig(),
)


@st.composite
def runs(draw: Any) -> tuple[str, Case, str, bool]:
    """(kind of heads, what is asked for, policy, whether drafts are the true text)."""
    tokens = st.integers(0, VOCABULARY - 1)
    repeated = st.lists(tokens, min_size=2, max_size=5).map(lambda part: (part * 12)[:40])
    case = Case(
        architecture="llama",
        prompt=tuple(draw(st.one_of(st.lists(tokens, min_size=1, max_size=30), repeated))),
        max_tokens=draw(st.sampled_from([18, 1, 2, 7])),
        layout="plain",
        slots=1,
        lookup=draw(st.booleans()),
        acceptance=None,
        prefill_step_size=draw(st.sampled_from([1, 3, 8, 2048])),
        kv_bits=None,
        quantized_kv_start=5000,
        sampling=SamplingConfig(
            temperature=draw(st.sampled_from([0.0, 0.8])),
            seed=draw(st.integers(0, 2**40)),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        ),
    )
    kinds = st.sampled_from(["medusa", "medusa, few ids", "parallel"])
    return draw(kinds), case, draw(st.sampled_from(["chain", "sometimes"])), draw(st.booleans())


def test_same_text() -> None:
    """The law of the package. Certificates of near ties are counted and must be rare."""
    certificates = examples = accepted = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @example(("medusa", ALWAYS, "chain", True))
    @example(("parallel", ALWAYS, "chain", True))
    @given(runs())
    def law(run: tuple[str, Case, str, bool]) -> None:
        nonlocal certificates, examples, accepted
        kind, case, policy, knowing = run
        expected, logits = plain_tokens(case)
        stats = DecodeStats()
        with pytest.MonkeyPatch.context() as patch:
            if knowing:
                patch.setattr(Knowing, "truth", (len(case.prompt), expected))
                patch.setattr("mtp_mlx.drafters.heads.medusa.MedusaDrafter", KnowingMedusa)
                patch.setattr("mtp_mlx.drafters.heads.parallel.ParallelDrafter", KnowingParallel)
            found = list(
                mtp_generate_step(
                    list(case.prompt),
                    model_with(kind),
                    max_tokens=case.max_tokens,
                    sampling=case.sampling,
                    policy=ChainPolicy(HEADS) if policy == "chain" else SometimesChain(HEADS),
                    lookup=LookupDrafter(3, 1) if case.lookup else None,
                    stats=stats,
                    **case.cache_options(),
                )
            )
        tokens = [item.token for item in found]
        examples += 1
        accepted += stats.drafted_by["heads"]
        assert len(tokens) == stats.tokens == case.max_tokens
        if tokens != expected:
            parted = next(
                i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1
            )
            assert certified(case, logits, found, parted), (parted, tokens, expected)
            certificates += 1

    law()
    print(f"{examples} examples, {accepted} drafts of heads accepted, {certificates} near ties")
    assert accepted >= 20, "known drafts must be accepted, or nothing is tested"
    assert certificates <= examples // 30


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["medusa", "medusa, few ids"])
def test_a_tree_holds_the_likeliest_products_of_candidates(kind: str, temperature: float) -> None:
    """At a temperature, of the candidates that the noise of their position favours."""
    model, width = model_with(kind), 3
    heads: Any = model.speculator
    picker = Picker(SamplingConfig(temperature=temperature, seed=4))
    state = mx.array(np.random.default_rng(1).normal(size=(1, 1, 48)).astype(np.float32))
    seen = verified_block(state, mx.array([7]), 0, 9, [3], HEADS)
    fresh = heads.open(model, picker, HEADS, 0).propose(
        replace(seen, layout=replace(seen.layout, width=width))
    )
    nodes: Any = zip(fresh.ids.tolist(), fresh.parents.tolist(), fresh.confidences.tolist(), strict=True)
    tree = DraftTree(*zip(*nodes, strict=True))
    expected, paths = list[tuple[int, ...]](), [((), 1.0)]
    for depth, head in enumerate(heads.heads, start=1):
        logits = heads.logits(model, head(state[0]), depth)
        found: Any = picker.candidates(logits, mx.array([9 + depth]), None, model.draft_ids, width)
        choices = list(zip(found[0][0].tolist(), found[1][0].tolist(), strict=True))
        longer = [((*path, token), along * one) for path, along in paths for token, one in choices]
        paths = sorted(longer, key=lambda one: -one[1])[:width]
        expected += [path for path, _ in paths]
    assert [tuple(tree.tokens[one] for one in tree.path(node)) for node in range(len(tree))] == expected


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    chunks=st.lists(st.integers(1, 7), max_size=3),
    steps=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, HEADS)), min_size=1, max_size=7
    ),
    catch_up_at=st.sampled_from([1, 3, 256]),
)
def test_parallel_heads_step_by_step_equal_from_scratch(
    chunks: list[int], steps: list[tuple[int, int, int]], catch_up_at: int
) -> None:
    """Draft k is picked from what head k makes of all the trunk's rows in one pass."""
    attached = model_with("parallel")
    rng = np.random.default_rng(len(steps))
    states = mx.array(rng.normal(size=(1, 80, 48)).astype(np.float32))
    heads: Any = attached.speculator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtp_mlx.drafters.heads.parallel.CATCH_UP_AT", catch_up_at)
        refined: list[list[mx.array]] = []

        def spy(*args: Any) -> LazyDrafts:
            refined.append(args[3])
            return LazyDrafts(mx.zeros((len(args[3]),), dtype=mx.int32), mx.zeros((len(args[3]),)))

        patch.setattr("mtp_mlx.drafters.heads.parallel.pick_each", spy)
        drafter, rows = ParallelDrafter(attached, Picker(), heads, len(heads.heads)), 0
        for size in chunks:
            drafter.observe(states[:, rows : rows + size], [])
            rows += size
        for drafts, wanted, count in steps:
            accepted = min(drafts, wanted)
            wrong = mx.array(rng.normal(size=(1, drafts - accepted, 48)).astype(np.float32))
            block = mx.concatenate([states[:, rows : rows + accepted + 1], wrong], axis=1)
            if count == 0:  # as the session does after a step without a chain
                drafter.observe(block[:, : accepted + 1], [])
                rows += accepted + 1
                continue
            picks = mx.zeros((drafts + 1,), dtype=mx.int32)
            drafter.propose(verified_block(block, picks, accepted, 0, [], count))
            drafter.commit(accepted)
            rows += accepted + 1
            for head, found in zip(heads.heads[:count], refined.pop(), strict=True):
                expected = attached.last_norm(head(states[:, :rows])[0, -1])
                np.testing.assert_allclose(np.array(found[0]), np.array(expected), rtol=2e-4, atol=2e-4)
