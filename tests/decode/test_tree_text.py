"""The text with draft trees is that of plain decoding: any tree, cache and sampling; and planted faults are noticed.

What is compared with what, and what excuses a difference, is as in test_loop.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mtp_mlx.decode import step
from mtp_mlx.decode.lookup import LookupDrafter
from mtp_mlx.decode.loop import Token, mtp_generate_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.tree import ROOT, depths_of, walk
from mtp_mlx.model.block import BlockShape, block_shape
from mtp_mlx.planning.grow import TreePolicy
from tests.decode.fakes import MOST_SLOTS, drafting
from tests.decode.test_loop import Case, cases, certified, check_stats, plain_tokens
from tests.decode.trees import AnyTree, KnowingTrees
from tests.tiny import ARCHITECTURES, WINDOWED

EXAMPLES = 500
WINDOWS = sorted(set(WINDOWED) - {"gpt_oss"})


@st.composite
def tree_cases(draw: Any) -> Case:
    """As `cases`, on models with sliding windows too; `layout` is "any" or "best"."""
    case: Case = draw(cases())
    names = [case.architecture] if case.kv_bits else [case.architecture, *draw(st.permutations(WINDOWS))[:1]]
    return replace(
        case,
        architecture=draw(st.sampled_from(names)),
        layout=draw(st.sampled_from(["any", "any", "best"])),
        kv_bits=case.kv_bits
        and 8,  # a key that rounds to another of 16 steps moves logits by more than any bound
    )


def run(case: Case, truth: list[int], cache: list[Any], stats: DecodeStats) -> list[Token]:
    """Tokens of the loop under test."""
    own_seed = case.sampling.seed % 1000
    knowing: Any = None
    if case.acceptance is not None:
        knowing = KnowingTrees(truth, len(case.prompt), case.acceptance, own_seed)
    policy: Any = AnyTree(case.slots, own_seed)
    if case.layout == "best":
        policy = TreePolicy(2 + own_seed % 24, case.slots, [], places_slots=True)
    with drafting(knowing):
        return list(
            mtp_generate_step(
                list(case.prompt),
                case.model(),
                max_tokens=case.max_tokens,
                sampling=case.sampling,
                policy=policy,
                lookup=LookupDrafter(3, 1) if case.lookup else None,
                prompt_cache=cache,
                stats=stats,
                **case.cache_options(),
            )
        )


def parting(case: Case, stats: DecodeStats) -> tuple[int | None, bool]:
    """(where the texts part, or None; whether rounding excuses it)."""
    expected, logits = plain_tokens(case)
    cache = case.model().make_cache()
    items = run(case, expected, cache, stats)
    tokens = [item.token for item in items]
    assert {layer.offset for layer in cache} == {len(case.prompt) + len(tokens)}
    if tokens == expected:
        return None, True
    parted = next(i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1)
    return parted, certified(case, logits, items, parted)


@pytest.mark.parametrize("part", range(4))  # to run side by side
def test_same_text(part: int) -> None:
    """The law of the package, for trees. Certificates of near ties are counted and must be rare."""
    certificates: list[Case] = []
    examples = accepted = branched = 0

    @seed(part)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(tree_cases())
    def law(case: Case) -> None:
        nonlocal examples, accepted, branched
        stats = DecodeStats()
        parted, excused = parting(case, stats)
        assert parted is None or excused, parted
        if parted is not None:
            certificates.append(case)
        check_stats(case, stats, stats.tokens)
        examples += 1
        accepted += sum(stats.accepted)
        branched += sum(count for name, count in stats.layouts.items() if name.startswith("tree"))

    law()
    print(f"{examples} examples, {branched} trees, {accepted} drafts accepted, {len(certificates)} near ties")
    assert accepted > 2 * examples and branched > examples, (
        "trees must be accepted often, or nothing is tested"
    )
    assert len(certificates) <= examples // 50, certificates


# --- planted faults ----------------------------------------------------------------------------------------------


def other_parent(picks: mx.array, drafts: mx.array, parents: tuple[int, ...]) -> Any:
    """A draft is compared with the pick after another row of its parent's depth."""
    depths = depths_of(parents)
    last = {depth: node for node, depth in enumerate(depths)}
    other = [last[depth - 1] if depth > 1 else ROOT for depth in depths]
    return walk(picks, drafts, tuple(min(node - 1, parent) for node, parent in enumerate(other)))


def sibling_seen(drafts: int, slots: tuple[int, ...], lead: int, parents: tuple[int, ...]) -> BlockShape:
    """Every real row sees all real rows before it."""
    shape = block_shape(drafts, slots, lead, parents)
    seen = shape.visibility.copy()
    seen[: drafts + 1, : drafts + 1] = np.tril(np.ones((drafts + 1, drafts + 1), dtype=bool))
    return replace(shape, visibility=seen)


FAULTS: dict[str, Any] = {
    "noise per row": lambda: mock.patch.object(Picker, "pick", _noisy),
    "wrong parent": lambda: mock.patch.object(step, "walk", other_parent),
    "a sibling is visible": lambda: mock.patch.object(step, "block_shape", sibling_seen),
    "none": nullcontext,
}
_pick = Picker.pick


def _noisy(picker: Picker, logits: mx.array, positions: mx.array, *rest: Any) -> mx.array:
    rows = positions.shape[0]
    return _pick(picker, logits, positions + 1000 * mx.arange(rows) if rows > 1 else positions, *rest)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("architecture", "kv_bits"), [("llama", None), ("qwen3", 8), (WINDOWS[0], None)])
def test_planted_faults_are_noticed(fault: str, architecture: str, kv_bits: int | None) -> None:
    """Each of them changes the text of one of a few cases, in each kind of cache; without a fault none changes."""
    assert architecture in (*ARCHITECTURES, *WINDOWS)
    changed = []
    for number in range(6):
        sampling = SamplingConfig(temperature=0.8, seed=number)
        case = Case(
            architecture, (5, 9, 2, number), 24, "any", MOST_SLOTS, False, 0.9, 2048, kv_bits, 0, sampling
        )
        truth, _ = plain_tokens(case)
        with FAULTS[fault]():
            items = run(case, truth, case.model().make_cache(), DecodeStats())
        changed.append([item.token for item in items] != truth)
    assert any(changed) == (fault != "none")
