"""Picks the token for a position; a draft is accepted if it equals this pick.

Contract: `Picker.pick` is deterministic, lazy (no host read) and row-independent: a row's token depends on its own
logits, position and history, never on the other rows or on their number. The text is therefore the same with any
drafter and any layout.
Invariant: noise is drawn once for (seed, position, token id), see `metal_kernels/position_noise`; there is never a
choice between several noises.
Order, as in mlx-lm's `generate_step` and `make_sampler`: bias, penalties, log-probabilities, top-p, min-p, XTC,
top-k, temperature, sampling. At temperature 0 penalties are computed in the model's own precision, by mlx-lm's
operations: in half precision their rounding decides (two bfloat16 numbers between 4 and 8 are equal or 0.03 apart).
Its log-probabilities are rounded as well, so tokens may tie that had different logits; only an exact picker computes
them, because this takes longer than everything else here. Above temperature 0 logits are float32. Tokens are sampled
by Gumbel-max, or by the inverse CDF in vocabulary order with one uniform per position (Parallel Token Prediction,
arXiv 2512.21323); the marginal of either is exactly the warped softmax.
XTC drops the likeliest tokens with some probability; whether it does is a further uniform of the position.
Without top-p, min-p, XTC and top-k, sampling needs no log-probabilities, and the Gumbel-max pick is
argmax(logits * (1 / temperature) + gumbel) with each operation rounded once in float32: the Metal kernels compute the
same in one pass, bit for bit.

Legend: R rows, V columns of the logits (the vocabulary, or a draft vocabulary), C tokens of history.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mtp_mlx.errors import MTPError
from mtp_mlx.metal_kernels.inverse_cdf import blurred, inverse_cdf
from mtp_mlx.metal_kernels.position_noise import gumbel, position_uniforms, row_keys

NoiseName = Literal["gumbel", "inverse-cdf"]

XTC_SALT = 0x585443  # makes XTC's uniforms others than those that pick
SMALLEST_TEMPERATURE = 1e-4  # below it float32 log-probabilities divided by the temperature lose their order


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are picked. Names, defaults and meanings are mlx-lm's; 0 turns a penalty or a warp off.

    Attributes:
        temperature: 0 picks the most likely token and ignores noise and warps.
        top_k: keep the k most likely tokens; 0, or at least the vocabulary size, keeps all.
        top_p: keep the smallest set of tokens with this probability; 0 or 1 keeps all.
        min_p: keep tokens with at least this fraction of the top probability.
        min_tokens_to_keep: tokens that min-p never removes.
        xtc_probability: of dropping, at a position, all tokens above `xtc_threshold` but the least likely of them.
        xtc_threshold: from 0 to 0.5.
        xtc_special_tokens: ids that XTC never drops, such as those of a newline and of the end of a text.
        repetition_penalty: divides positive and multiplies negative logits of repeated tokens; 1 or 0 for none.
        presence_penalty: subtracted from the logits of repeated tokens.
        frequency_penalty: subtracted once per repetition.
        repetition_context_size, presence_context_size, frequency_context_size: how many of the last tokens count as
            repeated, including the prompt's.
        logit_bias: (token id, what is added to its logit) for each token that is to be likelier or less likely.
        seed: 0 <= seed < 2^64.
        noise: sampling method: "gumbel" (one value per position and token) or "inverse-cdf" (one uniform per
            position); None for the one that the drafter was trained for, else "gumbel".

    Raises:
        MTPError: if any value is out of range (lists all of them).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    noise: NoiseName | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r} but must be {must_be}"
            for name, must_be, holds in self._rules()
            if not holds
        ]
        if problems:
            raise MTPError("Sampling: " + "; ".join(problems) + ".")

    def _rules(self) -> list[tuple[str, str, bool]]:
        """(field, what it must be, whether it is) for each field with a rule."""
        temperature = self.temperature
        temperature_holds = temperature == 0 or SMALLEST_TEMPERATURE <= temperature < math.inf
        rules = [
            ("temperature", f"0 or a finite number from {SMALLEST_TEMPERATURE}", temperature_holds),
            ("top_k", "a whole number from 0", isinstance(self.top_k, int) and self.top_k >= 0),
            ("top_p", "from 0 to 1", 0 <= self.top_p <= 1),
            ("min_p", "from 0 to 1", 0 <= self.min_p <= 1),
            ("xtc_probability", "from 0 to 1", 0 <= self.xtc_probability <= 1),
            ("xtc_threshold", "from 0 to 0.5", 0 <= self.xtc_threshold <= 0.5),
            ("repetition_penalty", "finite and not negative", 0 <= self.repetition_penalty < math.inf),
            ("presence_penalty", "finite", math.isfinite(self.presence_penalty)),
            ("frequency_penalty", "finite", math.isfinite(self.frequency_penalty)),
            ("logit_bias", "pairs of an id from 0 and a finite number", all(map(_is_bias, self.logit_bias))),
            ("noise", "'gumbel' or 'inverse-cdf'", self.noise in (None, *get_args(NoiseName))),
            ("seed", "a whole number below 2^64", isinstance(self.seed, int) and 0 <= self.seed < 2**64),
        ]
        for name in (
            "min_tokens_to_keep",
            "repetition_context_size",
            "presence_context_size",
            "frequency_context_size",
        ):
            value = getattr(self, name)
            rules.append((name, "a whole number from 1", isinstance(value, int) and value >= 1))
        return rules

    @property
    def penalises_repetition(self) -> bool:
        """Whether the repetition penalty has any effect."""
        return self.repetition_penalty not in (0.0, 1.0)

    def warps(self, n_columns: int) -> bool:
        """Whether top-p, min-p, XTC or top-k can drop any of `n_columns` tokens."""
        return (
            0 < self.top_p < 1
            or self.xtc_probability > 0
            or (self.min_p > 0 and self.min_tokens_to_keep < n_columns)
            or 0 < self.top_k < n_columns
        )

    @property
    def history_size(self) -> int:
        """How many tokens before a pick the penalties depend on; 0 without penalties."""
        sizes = (
            self.repetition_context_size if self.penalises_repetition else 0,
            self.presence_context_size if self.presence_penalty else 0,
            self.frequency_context_size if self.frequency_penalty else 0,
        )
        return max(sizes)


def _is_bias(pair: tuple[int, float]) -> bool:
    token, bias = pair
    return isinstance(token, int) and token >= 0 and math.isfinite(bias)


class Picker:
    """Picks tokens according to a `SamplingConfig`, and holds no other state.

    Args:
        config: greedy by default.
        exact: whether the pick at temperature 0 is mlx-lm's even where log-probabilities tie by rounding.
    """

    def __init__(self, config: SamplingConfig | None = None, exact: bool = False) -> None:
        self.config, self._exact = config or SamplingConfig(), exact
        # [n] float32 of the ids below n, where n - 1 is the highest id with a bias.
        self._bias = _dense(self.config.logit_bias) if self.config.logit_bias else None

    def draws_plainly(self, n_columns: int) -> bool:
        """Whether a pick is just argmax(logits / temperature + noise), without bias, penalties or warps."""
        sampled = self.config.temperature > 0
        more = sampled and (self.config.warps(n_columns) or self.config.noise == "inverse-cdf")
        return not more and self._bias is None and self.config.history_size == 0

    def noise_keys(self, positions: mx.array) -> mx.array | None:
        """[R, 2] uint32 noise keys of positions [R]; None if greedy. See `metal_kernels/position_noise`."""
        return None if self.config.temperature == 0 else row_keys(self.config.seed, positions)

    @property
    def history_size(self) -> int:
        """C, how many columns of `history` `pick` needs; 0 if none."""
        return self.config.history_size

    def pick(
        self,
        logits: mx.array,
        positions: mx.array,
        history: mx.array | None = None,
        token_ids: mx.array | None = None,
    ) -> mx.array:
        """The token of each row, int32 [R], lazily.

        Args:
            logits: [R, V] of any float type.
            positions: [R] int32, absolute position of the token to pick.
            history: [R, >= C] int32 tokens before each row's pick, newest last, padded on the left with -1; needed
                with penalties only.
            token_ids: [V] int32 vocabulary id of each column of a reduced vocabulary; None if columns are ids. Noise
                and penalties use the vocabulary ids, and these are returned. Must be ascending with "inverse-cdf".

        Raises:
            ValueError: if there are penalties and no history.
        """
        if self.config.temperature == 0:
            ranked = self.ranked(self._penalised(logits, history, token_ids))
            return _real_ids(mx.argmax(ranked, axis=-1), token_ids)
        scores = self.scores(logits, history, token_ids, positions)
        return _real_ids(self._columns(scores, positions, token_ids), token_ids)

    def ranked(self, logits: mx.array) -> mx.array:
        """[R, V] numbers whose order decides at temperature 0: `logits`, or if exact, mlx-lm's log-probabilities.

        A row at a time, because mlx-lm normalises one row: over several, MLX would add in another order.
        """
        if self.config.temperature or not self._exact:
            return logits
        rows = [logits[row : row + 1] for row in range(logits.shape[0])]
        return mx.concatenate([row - mx.logsumexp(row, keepdims=True) for row in rows])

    def pick_with_confidence(
        self,
        logits: mx.array,
        positions: mx.array,
        history: mx.array | None = None,
        token_ids: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """As `pick`, with the probability of each picked token, float32 [R].

        The probability is that of the warped, temperature-scaled distribution that was sampled; if greedy, that of
        the softmax of the penalised logits.
        """
        scores = self.scores(logits, history, token_ids, positions)
        columns = self._columns(scores, positions, token_ids)
        picked = mx.take_along_axis(scores, columns[:, None], axis=-1).squeeze(-1)
        confidence = mx.exp(picked - mx.logsumexp(scores, axis=-1))
        return _real_ids(columns, token_ids), confidence

    def candidates(
        self,
        logits: mx.array,
        positions: mx.array,
        history: mx.array | None,
        token_ids: mx.array | None,
        count: int,
    ) -> tuple[mx.array, mx.array]:
        """The tokens that are likeliest to be picked at each row's position, int32 [R, n], and how likely, float32.

        With noise these are the tokens with the largest perturbed scores, and chances are those of a softmax of
        these: the target's pick has the same noise, so it is one of them much more often than a token drawn afresh.
        With one uniform a position they are the tokens that it picks if it is `blurred`.

        Args:
            logits, positions, history, token_ids: as for `pick`.
            count: n; the number of columns if there are fewer.
        """
        count = min(count, logits.shape[-1])
        scores = self.scores(logits, history, token_ids, positions)
        real_ids = mx.arange(scores.shape[-1]) if token_ids is None else token_ids
        if self.config.temperature and self.config.noise == "inverse-cdf":
            scores = mx.log(blurred(scores, position_uniforms(self.config.seed, positions)))
        elif self.config.temperature:
            scores = scores + gumbel(self.config.seed, positions, real_ids)
        columns = mx.argpartition(-scores, kth=count - 1, axis=-1)[:, :count]
        within = mx.argsort(-mx.take_along_axis(scores, columns, axis=-1), axis=-1)
        columns = mx.take_along_axis(columns, within, axis=-1)  # [R, n], best first
        best = mx.take_along_axis(scores, columns, axis=-1)
        return _real_ids(columns, token_ids), mx.exp(best - mx.logsumexp(scores, axis=-1, keepdims=True))

    def scores(
        self,
        logits: mx.array,
        history: mx.array | None = None,
        token_ids: mx.array | None = None,
        positions: mx.array | None = None,
    ) -> mx.array:
        """[R, V] float32 logits of the distribution to pick from; arguments as for `pick`.

        Without positions, XTC drops nothing.
        """
        if self.config.temperature == 0:
            return self._penalised(logits, history, token_ids).astype(mx.float32)
        logits = self._penalised(logits.astype(mx.float32), history, token_ids)
        if self.config.warps(logits.shape[-1]):
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            logits = self._warped(logprobs, token_ids, positions)
        return logits * (1.0 / self.config.temperature)

    def _columns(self, scores: mx.array, positions: mx.array, token_ids: mx.array | None) -> mx.array:
        """[R] the column that each row picks with the noise of its position."""
        if self.config.temperature == 0:
            return mx.argmax(scores, axis=-1)
        if self.config.noise == "inverse-cdf":
            return inverse_cdf(scores, position_uniforms(self.config.seed, positions))
        real_ids = mx.arange(scores.shape[-1]) if token_ids is None else token_ids
        return mx.argmax(scores + gumbel(self.config.seed, positions, real_ids), axis=-1)

    def _warped(self, logprobs: mx.array, token_ids: mx.array | None, positions: mx.array | None) -> mx.array:
        """[R, V] with -inf for the tokens that mlx-lm's `make_sampler` would drop, using its own functions."""
        config, n_columns = self.config, logprobs.shape[-1]
        if 0 < config.top_p < 1:
            logprobs = apply_top_p(logprobs, config.top_p)
        if config.min_p > 0 and config.min_tokens_to_keep < n_columns:
            logprobs = apply_min_p(logprobs, config.min_p, config.min_tokens_to_keep)
        if config.xtc_probability > 0 and positions is not None:
            drops = position_uniforms(config.seed ^ XTC_SALT, positions) <= config.xtc_probability
            dropped = mx.where(_xtc_drops(logprobs, config, token_ids), -mx.inf, logprobs)
            logprobs = mx.where(drops[:, None], dropped, logprobs)
        if 0 < config.top_k < n_columns:
            logprobs = apply_top_k(logprobs, config.top_k)
        return logprobs

    def _penalised(self, logits: mx.array, history: mx.array | None, token_ids: mx.array | None) -> mx.array:
        """[R, V] after bias and penalties as by mlx-lm's `make_logits_processors`, with a history per row.

        In the type of `logits`.
        """
        config = self.config
        if self._bias is not None:
            logits = logits + _of_columns(self._bias, logits.shape[-1], token_ids).astype(logits.dtype)
        if config.history_size == 0:
            return logits
        if history is None:
            raise ValueError(f"penalties need the last {config.history_size} tokens of each row as history")

        def counts(context_size: int) -> mx.array:
            return _counts(history[:, -context_size:], logits.shape[-1], token_ids)

        if config.penalises_repetition:
            penalty = config.repetition_penalty
            punished = mx.where(logits < 0, logits * penalty, logits / penalty)
            logits = mx.where(counts(config.repetition_context_size) > 0, punished, logits)
        if config.presence_penalty:
            seen = counts(config.presence_context_size) > 0
            logits = mx.where(seen, logits - config.presence_penalty, logits)
        if config.frequency_penalty:
            recent = history[:, -config.frequency_context_size :]
            logits = _less_by_occurrence(logits, config.frequency_penalty, recent, token_ids)
        return logits


def _xtc_drops(logprobs: mx.array, config: SamplingConfig, token_ids: mx.array | None) -> mx.array:
    """[R, V] whether XTC, where it acts, drops a token: one likelier than another one above the threshold."""
    probs = mx.softmax(logprobs, axis=-1)
    least = mx.where(probs > config.xtc_threshold, probs, mx.inf).min(axis=-1, keepdims=True)
    if not config.xtc_special_tokens:
        return probs > least
    ids = mx.arange(logprobs.shape[-1]) if token_ids is None else token_ids
    special = mx.any(ids[:, None] == mx.array(config.xtc_special_tokens)[None], axis=-1)
    return (probs > least) & ~special


def _real_ids(columns: mx.array, token_ids: mx.array | None) -> mx.array:
    """[R] int32 vocabulary ids of the columns."""
    return (columns if token_ids is None else token_ids[columns]).astype(mx.int32)


def _dense(pairs: tuple[tuple[int, float], ...]) -> mx.array:
    """[n] float32 the bias of every id up to the highest one."""
    ids = mx.array([token for token, _ in pairs])
    biases = mx.array([bias for _, bias in pairs], dtype=mx.float32)
    dense = mx.zeros(max(token for token, _ in pairs) + 1).at[ids].add(biases)
    mx.eval(dense)  # a lazy array belongs to the thread that made it
    return dense


def _of_columns(bias: mx.array, n_columns: int, token_ids: mx.array | None) -> mx.array:
    """[n_columns] the bias of each column; 0 for ids beyond `bias`."""
    if token_ids is None:
        return mx.pad(bias, (0, n_columns - bias.size))
    known = bias[mx.minimum(token_ids, bias.size - 1)]
    return mx.where(token_ids < bias.size, known, 0.0)


def _counts(history: mx.array, n_columns: int, token_ids: mx.array | None) -> mx.array:
    """[R, n_columns] float32, how often each column's token occurs in each row's history.

    `history` is int32 [R, C]; -1 and ids without a column are not counted.
    """
    if token_ids is not None:
        matches = history[:, :, None] == token_ids[None, None, :]  # [R, C, V]; the draft vocabulary is small
        return matches.sum(axis=1).astype(mx.float32)
    rows, columns = _places(history, n_columns)
    return mx.zeros((history.shape[0], n_columns + 1)).at[rows, columns].add(1.0)[:, :n_columns]


def _places(history: mx.array, n_columns: int) -> tuple[mx.array, mx.array]:
    """Rows and columns of the tokens in each row's history [R, C]; padding is in one more column, to be cut off."""
    rows = mx.broadcast_to(mx.arange(history.shape[0])[:, None], history.shape)
    return rows, mx.where(history < 0, n_columns, history)


def _less_by_occurrence(
    logits: mx.array, penalty: float, history: mx.array, token_ids: mx.array | None
) -> mx.array:
    """[R, V] less `penalty` for each occurrence in each row's history; subtracted one by one, as in mlx-lm."""
    n_columns = logits.shape[-1]
    if token_ids is not None:  # a draft vocabulary: for drafts, which need not be exact
        return logits - (penalty * _counts(history, n_columns, token_ids)).astype(logits.dtype)
    rows, columns = _places(history, n_columns)
    return mx.pad(logits, [(0, 0), (0, 1)]).at[rows, columns].subtract(penalty)[:, :n_columns]


def leading_run(picks: mx.array, drafts: mx.array) -> mx.array:
    """Number of accepted drafts: the length of the leading run of equal tokens, not the count of matches.

    Args:
        picks: [d + 1] int32 target picks; picks[i] is for the same position as drafts[i].
        drafts: [d] int32.

    Returns:
        int32 scalar, lazily.
    """
    if drafts.size == 0:
        return mx.array(0, dtype=mx.int32)
    equal = (picks[:-1] == drafts).astype(mx.int32)
    return mx.sum(mx.cumprod(equal)).astype(mx.int32)
