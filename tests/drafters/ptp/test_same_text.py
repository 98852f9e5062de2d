"""Text with Parallel Token Prediction is that of plain decoding with inverse-CDF picks at the same seed: both
variants, all embeddings of uniforms, temperatures 0 to 1.2, every warp and layout; and picks follow the warped
softmax unless uniforms are drawn again after a rejection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_mlx.decode import step
from mtp_mlx.decode.drafter import LazyDrafts, Verified
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy, Policy
from mtp_mlx.decode.session import Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.ptp.draft import PTPSlotDrafter
from mtp_mlx.drafters.ptp.uniform_embedding import UNIFORM_EMBEDDINGS
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.block import Block
from mtp_mlx.planning.budget import BudgetPolicy
from mtp_mlx.planning.cost import StepCost
from tests.decode.fakes import attached, untouched
from tests.decode.test_pick import warped_softmax
from tests.drafters.ptp.ptp_fakes import MOST_SLOTS, ptp_attached, ptp_drafting
from tests.tiny import VOCABULARY

NEAR_TIE = 1e-4  # logits of two passes over the same text differ by rounding
EXAMPLES = 50


@dataclass(frozen=True)
class Case:
    """One drawn setting."""

    architecture: str
    variant: str
    embedding: str
    prompt: tuple[int, ...]
    max_tokens: int
    layout: str
    slots: int
    acceptance: float | None  # of a drafter that knows the text; None drafts with the adapter itself
    sampling: SamplingConfig

    def model(self) -> Any:
        return ptp_attached(self.architecture, self.variant, self.embedding)

    def policy(self) -> Policy:
        if self.layout == "auto":
            cost = StepCost((1, 40), (1, 64), (1.0, 1.5), (1.0, 1.5), (1,), (0.0,), 0.0, (1.0, 1.0))
            return BudgetPolicy(cost, self.slots, [0.8] * self.slots, "slots")
        return FixedPolicy(self.layout, self.slots)  # type: ignore[arg-type]


@st.composite
def cases(draw: Any) -> Case:
    """Anything PTP can be asked for."""
    sampling = SamplingConfig(
        temperature=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.2])),
        seed=draw(st.integers(0, 2**40)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.0, 1.3])),
    )
    warp = draw(
        st.sampled_from([{}, {"top_k": 7}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.8}, {"min_p": 0.05}])
    )
    return Case(
        architecture=draw(st.sampled_from(["llama", "gemma2", "granite"])),
        variant=draw(st.sampled_from(["o", "c"])),
        embedding=draw(st.sampled_from(UNIFORM_EMBEDDINGS)),
        prompt=tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20))),
        max_tokens=draw(st.sampled_from([18, 1, 7, 24])),
        layout=draw(st.sampled_from(["quadratic", "linear", "auto"])),
        slots=draw(st.integers(1, MOST_SLOTS)),
        acceptance=draw(st.sampled_from([0.95, None, 0.95, 0.7])),
        sampling=replace(sampling, **warp),
    )


def reference(case: Case) -> tuple[list[int], list[mx.array]]:
    """Plain decoding of a model that was never attached to PTP, with inverse-CDF picks."""
    model = attach(untouched(case.architecture))
    try:
        sampling = replace(case.sampling, noise="inverse-cdf")
        steps = mtp_generate_step(list(case.prompt), model, max_tokens=case.max_tokens, sampling=sampling)
        items = list(steps)
    finally:
        model.detach()
    return [item.token for item in items], [item.logits for item in items]


def certified(case: Case, found: list[Any], logits: list[mx.array], parted: int) -> bool:
    """Whether the runs part by rounding only: equal logits up to rounding, each pick that of its own logits."""
    item = found[parted]
    picker = Picker(replace(case.sampling, noise="inverse-cdf"))
    text = [*case.prompt, *(earlier.token for earlier in found[:parted])]
    padded = [-1] * picker.history_size + text
    history = mx.array([padded[len(padded) - picker.history_size :]], dtype=mx.int32)
    pick = picker.pick(item.logits[None], mx.array([len(text)]), history)
    close = bool(np.abs(np.array(item.logits - logits[parted])).max() < NEAR_TIE)
    return close and pick.item() == item.token


def test_same_text() -> None:
    """The law of the package for PTP. Certificates of near ties are counted and must be rare."""
    certificates: list[Case] = []
    examples = accepted = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases())
    def law(case: Case) -> None:
        nonlocal examples, accepted
        expected, logits = reference(case)
        stats = DecodeStats()
        knowing = case.acceptance is not None
        truth = expected if knowing else []
        arguments = (truth, len(case.prompt), case.acceptance or 0.0, case.sampling.seed % 1000)

        def run() -> list[Any]:
            return list(
                mtp_generate_step(
                    list(case.prompt),
                    case.model(),
                    max_tokens=case.max_tokens,
                    sampling=case.sampling,
                    policy=case.policy(),
                    stats=stats,
                )
            )

        if knowing:
            with ptp_drafting(*arguments):
                items = run()
        else:
            items = run()
        tokens = [item.token for item in items]
        examples += 1
        accepted += sum(stats.accepted)
        assert stats.tokens == len(tokens) == case.max_tokens
        if tokens != expected:
            parted = next(
                i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1
            )
            assert certified(case, items, logits, parted), (parted, tokens, expected)
            certificates.append(case)

    law()
    print(f"{examples} examples, {accepted} drafts accepted, {len(certificates)} near ties")
    assert accepted > 2 * examples, "drafts must be accepted often, or nothing is tested"
    assert len(certificates) <= examples // 50, certificates


@pytest.mark.parametrize("embedding", UNIFORM_EMBEDDINGS)
@pytest.mark.parametrize("variant", ["o", "c"])
@pytest.mark.parametrize("layout", ["linear", "quadratic"])
def test_every_variant_and_embedding(variant: str, embedding: str, layout: str) -> None:
    """The real drafter with random weights, hot and greedy: the text is plain decoding's."""
    for sampling in (
        SamplingConfig(temperature=1.2, seed=9),
        SamplingConfig(temperature=0.3, top_p=0.9, top_k=30),
    ):
        case = Case("llama", variant, embedding, (3, 1, 4), 12, layout, 3, None, sampling)
        steps = mtp_generate_step(
            list(case.prompt), case.model(), max_tokens=12, sampling=sampling, policy=case.policy()
        )
        assert [item.token for item in steps] == reference(case)[0]


@pytest.mark.parametrize("variant", ["o", "c"])
def test_knowing_drafter_saves_passes(variant: str) -> None:
    """With drafts that are always right, only the first step commits a single token; leads count as rows."""
    sampling = SamplingConfig(temperature=0.8, seed=5)
    case = Case("llama", variant, "bits", (3, 1, 4), 21, "quadratic", 4, 1.0, sampling)
    truth, _ = reference(case)
    stats = DecodeStats()
    with ptp_drafting(truth, 3, 1.0, 0):
        steps = mtp_generate_step(
            [3, 1, 4], case.model(), max_tokens=21, sampling=sampling, policy=case.policy(), stats=stats
        )
        assert [item.token for item in steps] == truth
    assert stats.histogram == {1: 1, 5: 4}
    lead = 1 if variant == "o" else 0
    assert stats.rows == (1 + 4 + lead) + 4 * (5 + 5 * (4 + lead))


def test_the_adapters_noise_is_used_unless_asked_otherwise() -> None:
    """Plain decoding with the adapter attached picks by the inverse CDF; Gumbel noise only without drafting."""
    model = ptp_attached("llama", "c", "bits")

    def tokens(which: Any, sampling: SamplingConfig, policy: Any = None) -> list[int]:
        steps = mtp_generate_step([5, 6], which, max_tokens=12, sampling=sampling, policy=policy)
        return [item.token for item in steps]

    hot = SamplingConfig(temperature=1.0, seed=4)
    assert tokens(model, hot) == tokens(model, replace(hot, noise="inverse-cdf"))
    masks = attached("llama")
    assert tokens(model, replace(hot, noise="gumbel")) == tokens(masks, hot)
    assert tokens(model, hot) == tokens(masks, replace(hot, noise="inverse-cdf")) != tokens(masks, hot)
    with pytest.raises(MTPError, match="inverse-CDF sampling"):
        tokens(model, replace(hot, noise="gumbel"), FixedPolicy("linear", 2))


SEEDS = 360


class _Likeliest(PTPSlotDrafter):
    """Drafts the token that the target finds likeliest after its own pick."""

    table: mx.array  # [V] int32

    def propose(self, verified: Verified) -> LazyDrafts:
        """One useful draft; the rest repeats it."""
        own = super().propose(verified)
        ids = mx.broadcast_to(self.table[verified.pick], own.ids.shape) + 0 * own.ids
        return LazyDrafts(ids, own.confidences)


def _redrawing(
    session: Session, logits: Any, positions: Any, history: Any, tokens: Any, parents: tuple[int, ...]
) -> Any:
    """The planted bug: the pick that rejects a draft is thrown away and drawn again with another uniform."""
    found = _ACCEPTED(session, logits, positions, history, tokens, parents)
    picks, accepted = found.picks, found.accepted
    config = session.picker.config
    again = Picker(replace(config, seed=config.seed + 2**50))
    drawn = again.pick(logits, positions, history)
    rejecting = (mx.arange(picks.shape[0]) == accepted) & (accepted < picks.shape[0] - 1)
    return found._replace(picks=mx.where(rejecting, drawn, picks))


_ACCEPTED = step._accepted


def _chi_square(statistic_of: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(statistic, bound of five standard deviations); thin cells are merged."""
    thick = expected >= 5
    counts = np.append(statistic_of[thick], statistic_of[~thick].sum())
    wanted = np.append(expected[thick], expected[~thick].sum())
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    degrees = max(len(counts) - 1, 1)
    return float(((counts - wanted) ** 2 / wanted).sum()), degrees + 5 * float(np.sqrt(2 * degrees))


@pytest.mark.parametrize("planted", [False, True])
def test_committed_tokens_follow_the_warped_softmax(planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square over seeds of the first two tokens, the second one verified against a likely draft.

    With the planted bug, uniforms drawn again after a rejection, the text favours what is easily drafted.
    """
    model, prompt = ptp_attached("llama", "c", "bits"), [3, 1, 4]
    warps = {"temperature": 1.4, "top_k": 4}
    config = SamplingConfig(noise="inverse-cdf", **warps)

    def probabilities(text: list[int]) -> np.ndarray:
        hidden = model.forward(Block.real(mx.array([text])), model.make_cache())
        return warped_softmax(np.array(model.head(hidden)[0, -1]), config)

    first = probabilities(prompt)
    second = {int(token): probabilities([*prompt, int(token)]) for token in np.flatnonzero(first)}
    table = np.zeros(VOCABULARY, dtype=np.int32)
    expected = np.zeros((VOCABULARY, VOCABULARY))
    for token, following in second.items():
        table[token], expected[token] = following.argmax(), SEEDS * first[token] * following
    _Likeliest.table = mx.array(table)
    monkeypatch.setattr("mtp_mlx.drafters.ptp.weights.PTPSlotDrafter", _Likeliest)
    if planted:
        monkeypatch.setattr(step, "_accepted", _redrawing)
    counts = np.zeros_like(expected)
    stats = DecodeStats()
    for seed in range(SEEDS):
        steps = mtp_generate_step(
            prompt,
            model,
            max_tokens=3,
            sampling=replace(config, seed=seed),
            policy=FixedPolicy("linear", 1),
            stats=stats,
        )
        tokens = [item.token for item in islice(steps, 2)]  # a third would not be counted
        counts[tokens[0], tokens[1]] += 1
    assert stats.submitted[0] == SEEDS and 0 < stats.accepted[0] < SEEDS
    assert counts[expected == 0].sum() == 0
    statistic, bound = _chi_square(counts, expected)
    assert (statistic > bound) == planted, (statistic, bound)
