"""With a memory the text is that of plain decoding: any model that rolls back, any drafter beside it, any layout.

Greedy tokens are compared with mlx-lm's own on a model never attached to, sampled and penalised ones with our
plain loop. The memory knows the text that will be written, but for some words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step

from mtp_mlx.decode.loop import Token, mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import ChainPolicy, FixedPolicy, LookupPolicy, Policy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.memory.memory_file import MemoryFile
from mtp_mlx.drafters.memory.source import Memory
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.planning.budget import BudgetPolicy
from mtp_mlx.planning.grow import TreePolicy
from tests.decode.fakes import attached, untouched
from tests.decode.test_hybrid_loop import SUPPORTED, WITH_HEADS, Uneven, bare, with_heads
from tests.drafters.memory.tables import memory_of
from tests.planning.test_budget import cost_of
from tests.tiny import ARCHITECTURES, VOCABULARY

NEAR_TIE = 1e-4
EXAMPLES = 150


@dataclass(frozen=True)
class Case:
    """One drawn setting."""

    architecture: str
    beside: str  # what else drafts: "", "slots" or "heads"
    policy: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingConfig
    wrong: float  # share of the memory's words that are not those of the text
    running_text: bool
    most: int

    def model(self) -> AttachedModel:
        if self.beside == "slots":
            return attached(self.architecture)
        return with_heads(self.architecture, 2) if self.beside == "heads" else bare(self.architecture)

    @property
    def is_greedy(self) -> bool:
        """Whether mlx-lm's own generation is the reference."""
        return not self.sampling.temperature and self.sampling.repetition_penalty == 1

    def options(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "sampling": self.sampling}

    def chosen(self) -> Policy:
        """Planned, uneven or fixed steps, chains or trees."""
        if self.policy == "tree":
            positions = {"slots": 4, "heads": 2, "": 0}[self.beside]
            return TreePolicy(2 + 2 * self.most, positions, [], places_slots=self.beside == "slots")
        if self.policy == "auto":
            own = {"slots": "slots", "heads": "", "": ""}[self.beside]
            return BudgetPolicy(cost_of(0.05), 2 if own else 0, [], own)
        if self.policy == "uneven":
            return Uneven(self.most)
        if self.beside == "slots":
            return FixedPolicy("quadratic", min(self.most, 4))
        return ChainPolicy(2) if self.beside == "heads" else LookupPolicy(self.most)


def expected(case: Case) -> tuple[list[int], list[mx.array]]:
    """Tokens and logits (or log-probabilities) of a run that never drafts."""
    if not case.is_greedy:
        found = list(mtp_generate_step(list(case.prompt), case.model(), **case.options()))
        return [item.token for item in found], [item.logits for item in found]
    pairs = list(
        generate_step(mx.array(case.prompt), untouched(case.architecture), max_tokens=case.max_tokens)
    )
    return [int(token) for token, _ in pairs], [logprobs for _, logprobs in pairs]


def remembered(case: Case, truth: list[int], path: Path) -> Memory:
    """A memory of the prompt and the text, in which some words are other ones."""
    rng = np.random.default_rng(len(truth) + sum(truth))
    known = [token if rng.random() >= case.wrong else int(rng.integers(VOCABULARY)) for token in truth]
    path.unlink(missing_ok=True)
    return Memory(memory_of(path, [([*case.prompt, *known], len(case.prompt))]), VOCABULARY)


def run(case: Case, truth: list[int], path: Path, stats: DecodeStats) -> list[Token]:
    """Tokens of the loop under test."""
    drafter = remembered(case, truth, path).open(
        running_text=case.running_text, branching=case.policy == "tree"
    )
    return list(
        mtp_generate_step(
            list(case.prompt),
            case.model(),
            policy=case.chosen(),
            lookup=drafter,
            stats=stats,
            **case.options(),
        )
    )


@st.composite
def cases(draw: Any) -> Case:
    """Any model, any drafter beside the memory, any sampling."""
    beside = draw(st.sampled_from(["", "", "slots", "heads"]))
    known = {"": [*ARCHITECTURES, *SUPPORTED], "slots": ARCHITECTURES, "heads": WITH_HEADS}[beside]
    return Case(
        architecture=draw(st.sampled_from(known)),
        beside=beside,
        policy=draw(st.sampled_from(["fixed", "tree", "auto", "tree", "uneven"])),
        prompt=tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20))),
        max_tokens=draw(st.sampled_from([20, 1, 2, 9, 30])),
        sampling=SamplingConfig(
            temperature=draw(st.sampled_from([0.0, 0.0, 0.4, 0.8, 1.0, 1.3])),
            seed=draw(st.integers(0, 2**40)),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
            top_k=draw(st.sampled_from([0, 0, 9])),
        ),
        wrong=draw(st.sampled_from([0.0, 0.2, 0.2, 0.5, 1.0])),
        running_text=draw(st.booleans()),
        most=draw(st.integers(1, 9)),
    )


def test_same_text(tmp_path: Path) -> None:
    counted = {"memory": 0, "rejected": 0, "examples": 0, "near ties": 0}
    seen: set[str] = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases())
    def law(case: Case) -> None:
        truth, logits = expected(case)
        stats = DecodeStats()
        items = run(case, truth, tmp_path / "a.mem", stats)
        tokens = [item.token for item in items]
        counted["examples"] += 1
        counted["memory"] += stats.drafted_by.get("memory", 0)
        counted["rejected"] += stats.submitted_by.get("memory", 0) - stats.drafted_by.get("memory", 0)
        seen.update((case.beside or "alone", case.policy, case.architecture))
        if tokens != truth:  # the raw logits of both runs then differ by rounding only
            parted = next(i for i, pair in enumerate(zip(tokens, truth, strict=True)) if len(set(pair)) > 1)
            ours = items[parted].logits
            if case.is_greedy:
                ours = ours - mx.logsumexp(ours)
            gap = float(np.abs(np.array(logits[parted] - ours)).max())
            assert gap < NEAR_TIE, (parted, tokens, truth)
            counted["near ties"] += 1

    law()
    print(counted)
    assert counted["memory"] > 2 * counted["examples"] and counted["rejected"] > counted["examples"]
    assert counted["near ties"] <= counted["examples"] // 50
    assert {"alone", "slots", "heads", "fixed", "tree", "auto", "uneven"} <= seen and len(seen) > 25


@pytest.mark.parametrize("architecture", ["llama", *SUPPORTED])
def test_a_memory_of_the_text_saves_passes(architecture: str, tmp_path: Path) -> None:
    """Also with sliding windows and recurrent state, without any adapter."""
    case = Case(architecture, "", "fixed", (3, 1, 4), 24, SamplingConfig(0.8, seed=5), 0.0, False, 7)
    truth, _ = expected(case)
    stats = DecodeStats()
    assert [item.token for item in run(case, truth, tmp_path / "a.mem", stats)] == truth
    assert stats.steps <= 12 and stats.drafted_by["memory"] >= 12


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_table_holds(seed: int, tmp_path: Path) -> None:
    """A file whose counts are nonsense, of the right size: worse drafts, the same text."""
    case = Case(
        "llama", "", ("fixed", "tree")[seed % 2], (3, 1, 4), 24, SamplingConfig(0.8, seed), 0.0, True, 7
    )
    truth, _ = expected(case)
    path = tmp_path / "a.mem"
    whole = memory_of(path, [([*case.prompt, *truth], 3)] * 2)
    rng, content = np.random.default_rng(seed), bytearray(path.read_bytes())
    start = len(content) - 10 * whole.header.entries
    keys = np.frombuffer(bytes(content[start : start + 8 * whole.header.entries]), np.uint64).copy()
    mixed_up = keys ^ rng.integers(0, (1, 1 << 8, 1 << 24, 1 << 63)[seed], len(keys)).astype(np.uint64)
    counts = rng.integers(0, 1 << 16, len(keys)).astype(np.uint16)  # 0 too, which no table has
    path.write_bytes(bytes(content[:start]) + mixed_up.tobytes() + counts.tobytes())
    drafter = Memory(MemoryFile(path), VOCABULARY).open(running_text=True, branching=case.policy == "tree")
    items = mtp_generate_step(
        list(case.prompt), case.model(), policy=case.chosen(), lookup=drafter, **case.options()
    )
    assert [item.token for item in items] == truth
