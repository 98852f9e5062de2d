"""`Picker` against the warped softmax and mlx-lm's sampler; row independence, reduced vocabularies, penalties."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_top_k, apply_top_p, apply_xtc, make_logits_processors, make_sampler

from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.errors import MTPError
from mtp_mlx.metal_kernels.position_noise import gumbel

VOCABULARY = 23
WARPS = {
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.7},
    "top_p": {"temperature": 0.8, "top_p": 0.8},
    "top_k": {"temperature": 1.3, "top_k": 5},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "min_p keeping": {"temperature": 1.0, "min_p": 0.9, "min_tokens_to_keep": 4},
    "all": {"temperature": 0.9, "top_p": 0.95, "min_p": 0.02, "top_k": 9},
}
XTC = {
    "xtc": {"temperature": 1.0, "xtc_probability": 0.4, "xtc_threshold": 0.08},
    "xtc always": {"temperature": 1.2, "xtc_probability": 1.0, "xtc_threshold": 0.05, "top_k": 7},
    "xtc sparing": {
        "temperature": 0.9,
        "top_p": 0.9,
        "xtc_probability": 0.7,
        "xtc_special_tokens": (0, 2, 4, 9),
    },
}


def logits_of(seed: int, rows: int = 1, columns: int = VOCABULARY, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, columns)) * scale).astype(np.float32)


def warped_softmax(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """[V] float64 by the definitions of top-p, min-p, XTC and top-k, not by mlx-lm's code."""
    chance = config.xtc_probability
    return chance * softmax_of_kept(logits, config, True) + (1 - chance) * softmax_of_kept(
        logits, config, False
    )


def softmax_of_kept(logits: np.ndarray, config: SamplingConfig, xtc: bool) -> np.ndarray:
    """[V] at a position where XTC acts, or where it does not."""
    logprobs = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    keep = np.ones(len(logits), dtype=bool)
    order = np.argsort(-logprobs)
    if 0 < config.top_p < 1:
        mass_above = np.cumsum(np.exp(logprobs[order])) - np.exp(logprobs[order])
        keep[order[mass_above >= config.top_p]] = False
    if config.min_p > 0:
        keep &= logprobs >= logprobs.max() + np.log(config.min_p)
        keep[order[: config.min_tokens_to_keep]] = True
    if xtc and config.xtc_probability:
        shares = np.where(keep, np.exp(logprobs), 0)
        above = np.flatnonzero(shares / shares.sum() > config.xtc_threshold)
        spared = {above[np.argmin(shares[above])]} if len(above) else set()
        keep[[token for token in above if token not in spared | set(config.xtc_special_tokens)]] = False
    if config.top_k > 0:
        order = np.argsort(np.where(keep, -logprobs, np.inf), kind="stable")
        keep[order[config.top_k :]] = False
    weights = np.where(keep, np.exp((logprobs - logprobs.max()) / config.temperature), 0)
    return weights / weights.sum()


def assert_marginal(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square within five standard deviations; nothing outside the support; thin cells are merged."""
    assert counts[probabilities == 0].sum() == 0
    expected = counts.sum() * probabilities
    thick = expected >= 8
    counts = np.append(counts[thick], counts[~thick].sum())
    expected = np.append(expected[thick], expected[~thick].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = max(len(counts) - 1, 1)
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < degrees + 5 * np.sqrt(2 * degrees), (statistic, counts, expected)


def counted(ids: mx.array) -> np.ndarray:
    return np.bincount(np.array(ids), minlength=VOCABULARY)


@pytest.mark.parametrize("warp", [*WARPS, *XTC])
def test_marginal_over_positions_is_the_warped_softmax(warp: str) -> None:
    config = SamplingConfig(seed=2**40 + 7, **{**WARPS, **XTC}[warp])
    logits = logits_of(1)
    ids = Picker(config).pick(mx.broadcast_to(mx.array(logits), (20_000, VOCABULARY)), mx.arange(20_000))
    assert_marginal(counted(ids), warped_softmax(logits[0], config))


@pytest.mark.parametrize("warp", ["plain", "all"])
def test_marginal_over_seeds_is_the_warped_softmax(warp: str) -> None:
    logits = logits_of(2)
    block = mx.broadcast_to(mx.array(logits), (4, VOCABULARY))
    configs = [SamplingConfig(seed=seed, **WARPS[warp]) for seed in range(1500)]
    ids = mx.concatenate([Picker(config).pick(block, mx.arange(4) + 1000) for config in configs])
    assert_marginal(counted(ids), warped_softmax(logits[0], configs[0]))


@pytest.mark.parametrize("warp", WARPS)
def test_marginal_is_that_of_mlx_lms_sampler(warp: str) -> None:
    """Two-sample chi-square against draws of make_sampler."""
    config = SamplingConfig(seed=5, **WARPS[warp])
    rows = mx.broadcast_to(mx.array(logits_of(3)), (20_000, VOCABULARY))
    mx.random.seed(0)
    sampler = make_sampler(
        config.temperature, config.top_p, config.min_p, config.min_tokens_to_keep, config.top_k
    )
    theirs = counted(sampler(rows - mx.logsumexp(rows, axis=-1, keepdims=True)))
    ours = counted(Picker(config).pick(rows, mx.arange(20_000)))
    total = ours + theirs
    assert set(np.flatnonzero(ours > 60)) <= set(np.flatnonzero(theirs))
    assert set(np.flatnonzero(theirs > 60)) <= set(np.flatnonzero(ours))
    thick = total >= 16
    statistic = ((ours - theirs)[thick] ** 2 / total[thick]).sum()
    degrees = max(thick.sum() - 1, 1)
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("warp", XTC)
def test_xtc_where_it_acts_drops_what_mlx_lm_drops(warp: str) -> None:
    settings = {**XTC[warp], "xtc_probability": 1.0}
    config = SamplingConfig(**settings)
    logits = mx.array(logits_of(6, rows=5))
    found = Picker(config).scores(logits, positions=mx.arange(5))
    for row in range(5):
        logprobs = logits[row : row + 1] - mx.logsumexp(logits[row : row + 1], axis=-1, keepdims=True)
        if 0 < config.top_p < 1:
            logprobs = apply_top_p(logprobs, config.top_p)
        logprobs = apply_xtc(logprobs, 1.0, config.xtc_threshold, list(config.xtc_special_tokens))
        if config.top_k:
            logprobs = apply_top_k(logprobs, config.top_k)
        assert (np.array(found[row]) == -np.inf).tolist() == (np.array(logprobs[0]) == -np.inf).tolist()


@pytest.mark.parametrize("gap", [1, 2, 64])
def test_picks_of_neighbouring_positions_are_independent(gap: int) -> None:
    config = SamplingConfig(temperature=1.0, seed=17)
    logits = logits_of(4, columns=8, scale=0.7)
    picked = Picker(config).pick(mx.broadcast_to(mx.array(logits), (40_000, 8)), mx.arange(40_000))
    ids = np.array(picked)
    counts = np.bincount(ids[:-gap] * 8 + ids[gap:], minlength=64)
    probabilities = warped_softmax(logits[0], config)
    assert_marginal(counts, np.outer(probabilities, probabilities).ravel())


@settings(deadline=None, max_examples=40)
@given(
    data_seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    warp=st.sampled_from([*WARPS.values(), *XTC.values(), {"temperature": 0.0}]),
    penalised=st.booleans(),
)
def test_a_rows_pick_does_not_depend_on_the_block(
    data_seed: int, rows: int, warp: dict[str, float], penalised: bool
) -> None:
    penalties = {"repetition_penalty": 1.4, "frequency_penalty": 0.3} if penalised else {}
    picker = Picker(SamplingConfig(seed=data_seed, **warp, **penalties))  # type: ignore[arg-type]
    generator = np.random.default_rng(data_seed)
    logits = mx.array(logits_of(data_seed, rows))
    positions = mx.array(generator.integers(0, 2**31 - 1, size=rows).astype(np.int32))
    history = mx.array(generator.integers(-1, VOCABULARY, size=(rows, 20)).astype(np.int32))
    ids, confidence = picker.pick_with_confidence(logits, positions, history)
    assert ids.tolist() == picker.pick(logits, positions, history).tolist()
    for row in range(rows):
        one = slice(row, row + 1)
        alone = picker.pick_with_confidence(logits[one], positions[one], history[one])
        assert alone[0].tolist() == ids[one].tolist()
        assert alone[1].tolist() == confidence[one].tolist()


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data_seed=st.integers(0, 2**31), warp=st.sampled_from(list(WARPS.values())), penalised=st.booleans())
def test_a_reduced_vocabulary_picks_as_the_full_one_with_the_rest_at_minus_infinity(
    data_seed: int, warp: dict[str, float], penalised: bool
) -> None:
    bias = ((1, 0.7), (VOCABULARY // 2, -1.5))
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.3, "logit_bias": bias} if penalised else {}
    picker = Picker(SamplingConfig(seed=data_seed, **warp, **penalties))  # type: ignore[arg-type]
    generator = np.random.default_rng(data_seed)
    logits = logits_of(data_seed, rows=3)
    token_ids = generator.permutation(VOCABULARY)[:11].astype(np.int32)
    full = np.full_like(logits, -np.inf)
    full[:, token_ids] = logits[:, token_ids]
    positions = mx.array([5, 6, 7])
    history = mx.array(generator.integers(-1, VOCABULARY, size=(3, 20)).astype(np.int32))
    expected = picker.pick_with_confidence(mx.array(full), positions, history)
    columns = mx.array(logits[:, token_ids])
    actual = picker.pick_with_confidence(columns, positions, history, mx.array(token_ids))
    assert actual[0].tolist() == expected[0].tolist()
    np.testing.assert_allclose(np.array(actual[1]), np.array(expected[1]), rtol=1e-4)


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "repetition_context_size": 5},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.4, "frequency_context_size": 7},
        {"logit_bias": ((3, 2.5), (17, -100.0))},
        {
            "logit_bias": ((0, -1.5), (VOCABULARY - 1, 9.0)),
            "repetition_penalty": 1.2,
            "presence_penalty": -0.3,
            "presence_context_size": 3,
            "frequency_penalty": 0.2,
            "frequency_context_size": 11,
        },
    ],
)
@pytest.mark.parametrize("n_tokens", [1, 4, 40])
def test_penalties_equal_mlx_lms_logits_processors(penalties: dict[str, Any], n_tokens: int) -> None:
    config = SamplingConfig(**penalties)  # type: ignore[arg-type]
    logits = logits_of(6, rows=4)
    tokens = np.random.default_rng(n_tokens).integers(0, VOCABULARY, size=(4, n_tokens)).astype(np.int32)
    padded = np.full((4, config.history_size), -1, dtype=np.int32)
    kept = min(n_tokens, config.history_size)
    padded[:, config.history_size - kept :] = tokens[:, n_tokens - kept :]
    ours = Picker(config)._penalised(mx.array(logits), mx.array(padded), None)
    for row in range(4):
        expected = mx.array(logits[row : row + 1])
        named = {**penalties, "logit_bias": dict(penalties.get("logit_bias", ()))}
        for processor in make_logits_processors(**named):
            expected = processor(mx.array(tokens[row]), expected)
        np.testing.assert_allclose(np.array(ours)[row], np.array(expected)[0], rtol=1e-6, atol=1e-6)
    assert not np.allclose(np.array(ours), logits)


def test_greedy_is_the_argmax_and_ignores_noise_and_warps() -> None:
    logits = logits_of(7, rows=9)
    picker = Picker(SamplingConfig(seed=3, top_k=2, top_p=0.5))
    ids, confidence = picker.pick_with_confidence(mx.array(logits), mx.arange(9))
    np.testing.assert_array_equal(np.array(ids), logits.argmax(axis=-1))
    softmax = np.exp(logits - logits.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(
        np.array(confidence), (softmax / softmax.sum(-1, keepdims=True)).max(-1), rtol=1e-5
    )


@pytest.mark.parametrize("warp", WARPS)
def test_confidence_is_the_probability_under_the_warped_distribution(warp: str) -> None:
    config = SamplingConfig(seed=9, **WARPS[warp])
    logits = logits_of(8, rows=50)
    ids, confidence = Picker(config).pick_with_confidence(mx.array(logits), mx.arange(50))
    for row, (token, probability) in enumerate(zip(ids.tolist(), confidence.tolist(), strict=True)):
        assert probability == pytest.approx(warped_softmax(logits[row], config)[token], rel=1e-4)


@pytest.mark.parametrize("temperature", [1e-4, 0.6, 1.0, 1.9])
def test_without_warps_the_pick_is_one_expression_of_the_logits(temperature: float) -> None:
    """What the Metal kernels compute: no log-probabilities, each float32 operation rounded once."""
    logits, positions = logits_of(11, rows=300, columns=501), mx.arange(300)
    noise = np.array(gumbel(13, positions, mx.arange(501)))
    expected = (logits * np.float32(1.0 / temperature) + noise).argmax(axis=-1)
    picks = Picker(SamplingConfig(temperature=temperature, seed=13)).pick(mx.array(logits), positions)
    np.testing.assert_array_equal(np.array(picks), expected)


@pytest.mark.parametrize("warp", ["plain", "hot", "all"])
def test_a_common_shift_of_the_logits_changes_neither_pick_nor_confidence(warp: str) -> None:
    logits = np.round(logits_of(12, rows=100) * 1024) / 1024  # so that the shifted logits are exact
    picker = Picker(SamplingConfig(seed=3, **WARPS[warp]))
    ids, confidence = picker.pick_with_confidence(mx.array(logits), mx.arange(100))
    shifted = picker.pick_with_confidence(mx.array(logits + 512), mx.arange(100))
    assert shifted[0].tolist() == ids.tolist()
    np.testing.assert_allclose(np.array(shifted[1]), np.array(confidence), rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "warps"),
    [
        ({}, False),
        ({"top_p": 0.0}, False),
        ({"top_p": 0.99}, True),
        ({"min_p": 0.1}, True),
        ({"min_p": 0.1, "min_tokens_to_keep": VOCABULARY - 1}, True),
        ({"min_p": 0.1, "min_tokens_to_keep": VOCABULARY}, False),
        ({"top_k": VOCABULARY - 1}, True),
        ({"top_k": VOCABULARY}, False),
    ],
)
def test_whether_a_warp_can_drop_a_token(settings: dict[str, float], warps: bool) -> None:
    assert SamplingConfig(temperature=1.0, **settings).warps(VOCABULARY) is warps  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_are_picked_from_in_float32(dtype: mx.Dtype) -> None:
    logits = mx.array(logits_of(10, rows=200)).astype(dtype)
    for config in (SamplingConfig(), SamplingConfig(temperature=0.7, top_p=0.9, seed=1)):
        picker = Picker(config)
        half = picker.pick(logits, mx.arange(200))
        assert half.dtype == mx.int32
        assert half.tolist() == picker.pick(logits.astype(mx.float32), mx.arange(200)).tolist()


def test_history_size_and_missing_history() -> None:
    assert Picker().history_size == 0
    assert Picker(SamplingConfig(repetition_penalty=0.0)).history_size == 0
    config = SamplingConfig(repetition_penalty=1.1, presence_penalty=1.0, presence_context_size=33)
    assert Picker(config).history_size == 33
    with pytest.raises(ValueError, match="33"):
        Picker(config).pick(mx.zeros((1, 4)), mx.array([0]))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": 1e-6},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_tokens_to_keep": 0},
        {"repetition_penalty": -1.0},
        {"presence_penalty": float("inf")},
        {"repetition_context_size": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1.5, 1.0),)},
        {"logit_bias": ((1, float("inf")),)},
    ],
)
def test_bad_values_are_named(values: dict[str, float]) -> None:
    with pytest.raises(MTPError, match=next(iter(values))):
        SamplingConfig(**values)  # type: ignore[arg-type]


def test_every_bad_value_is_listed_at_once() -> None:
    with pytest.raises(MTPError, match=r"top_p.*min_p.*seed"):
        SamplingConfig(top_p=2.0, min_p=2.0, seed=-1)


@pytest.mark.parametrize(
    ("settings", "plainly"),
    [
        ({}, True),
        ({"temperature": 0.5}, True),
        ({"temperature": 0.5, "top_p": 0.9}, False),
        ({"temperature": 0.0, "top_p": 0.9}, True),
        ({"temperature": 0.5, "min_p": 0.1}, False),
        ({"temperature": 0.5, "top_k": 3}, False),
        ({"temperature": 0.5, "top_k": 40, "min_p": 0.5, "min_tokens_to_keep": 40}, True),
        ({"repetition_penalty": 1.1}, False),
        ({"logit_bias": ((3, 1.0),)}, False),
        ({"temperature": 0.5, "logit_bias": ((3, 1.0),)}, False),
        ({"temperature": 0.5, "frequency_penalty": 0.2}, False),
    ],
)
def test_what_a_kernel_may_pick(settings: dict[str, float], plainly: bool) -> None:
    """Kernels know neither warps nor penalties; a warp that drops nothing is none."""
    picker = Picker(SamplingConfig(**settings))  # type: ignore[arg-type]
    assert picker.draws_plainly(40) is plainly
    assert (picker.noise_keys(mx.arange(3)) is None) == (picker.config.temperature == 0)


# --- candidates of a tree -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["gumbel", "inverse-cdf"])
@pytest.mark.parametrize("warp", WARPS)
def test_the_first_candidate_is_the_pick_and_the_others_follow_in_order(warp: str, noise: str) -> None:
    config = SamplingConfig(seed=5, noise=noise, **WARPS[warp])  # type: ignore[arg-type]
    logits, positions, picker = mx.array(logits_of(6, rows=40)), mx.arange(40), Picker(config)
    ids, chances = picker.candidates(logits, positions, None, None, 3)
    assert ids.shape == chances.shape == (40, 3) and ids.dtype == mx.int32
    picked, found = np.array(picker.pick(logits, positions)), np.array(chances)
    if noise == "gumbel" or not config.temperature:
        np.testing.assert_array_equal(np.array(ids[:, 0]), picked)
    else:  # a neighbour may be likelier than the pick if that has hardly any mass
        assert (np.array(ids[:, 0]) == picked).mean() > 0.6
        assert (np.array(ids) == picked[:, None]).any(axis=1).mean() > 0.95
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert (
        (found[:, 0] >= found[:, 1]).all()
        and (found[:, 1] >= found[:, 2]).all()
        and (found >= 0).all()
        and (found.sum(axis=1) <= 1 + 1e-5).all()
    )


def test_greedy_candidates_are_the_likeliest_ids_of_a_draft_vocabulary() -> None:
    logits, ids = logits_of(7, rows=20), mx.array([3 * column for column in range(logits_of(7).shape[1])])
    found, chances = Picker().candidates(mx.array(logits), mx.arange(20), None, ids, 4)
    order = np.argsort(-logits, axis=-1)[:, :4]
    np.testing.assert_array_equal(np.array(found), 3 * order)
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.array(chances), np.take_along_axis(softmax, order, -1), rtol=1e-4)
