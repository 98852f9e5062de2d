"""The decode loop: block -> forward -> verify -> draft -> commit, one host read per step.

`speculative_step` is one step; `mtp_generate_step` yields the tokens and where each came from. Contract: for a given
seed the tokens are those of plain decoding, whatever the policy and the drafters do (unverified emission has a loop
of its own, `emit.py`). New drafts are proposed before the step is committed, while everything is still lazy, so that
the host reads the accepted length and the drafts together. Non-goals: text, stop strings, timing.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mtp_mlx.decode.constraint import Constraint, LogitsProcessor
from mtp_mlx.decode.drafter import Drafter, DraftSource, source_of
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.emit import EmitLoop
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.lookup import TextDrafter
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy, Policy, Proposal, without_branches
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.step import StepResult, Token, block_of, commit, draft, verify
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.token_ids import check_ids

CLEAR_EVERY = 256  # tokens between releases of MLX's buffer cache, as in mlx-lm


def speculative_step(session: Session, layout: Layout, drafts: list[int]) -> StepResult:
    """Verifies `drafts` (layout.drafts of them), drafts the next tokens, and commits what was accepted."""
    attached, start = session.attached, session.cached
    block = block_of(session, layout, drafts, start)
    hidden = session.forward(block)[0]  # [R, D]
    logits = attached.head(hidden[None, : layout.real_rows])[0]  # [1 + d, V]
    verified = verify(session, layout, drafts, start, hidden, logits, attached.head_input)
    lazy = draft(session, verified)
    mx.eval(lazy.arrays())  # the step's one host read
    result = commit(session, lazy)
    session.keep_path(result.kept)
    return result


def mtp_generate_step(
    prompt: mx.array | np.ndarray | Sequence[int],
    model: AttachedModel,
    *,
    max_tokens: int = 256,
    sampling: SamplingConfig | None = None,
    policy: Policy | None = None,
    lookup: TextDrafter | None = None,
    emission: Emission | None = None,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    prefill_step_size: int = 2048,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    stats: DecodeStats | None = None,
    constraint: Constraint | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prefix: Sequence[int] = (),
    states_at: dict[int, list[Any]] | None = None,
) -> Generator[Token, None, None]:
    """Yields the tokens that follow `prompt`, called like mlx-lm's `generate_step`.

    Args:
        prompt: [T] int token ids not yet in `prompt_cache`; a list, or an mlx or numpy array.
        model: from `mtp_mlx.load` or `attach`.
        max_tokens: most tokens to yield; -1 for no limit.
        sampling: in place of a sampler, since picks are functions of their position; greedy by default.
        policy: chooses the layout of each step; plain by default.
        lookup: drafts from text alone, beside the model's own drafter.
        emission: verified by default. Unverified (lossy): `policy.max_drafts` tokens per pass, from slots only.
        prompt_cache: mlx-lm cache of an earlier prefix, which MTP heads have not seen. In the end it holds that, the
            prompt and all tokens yielded; after an error or Ctrl-C in a step, as many of these as its offset says.
        stats: updated while decoding.
        prefix: the token ids in `prompt_cache`, for drafters that read the text, and caches that do not count them.
        constraint: constrains every token, such as a grammar; verified emission only.
        logits_processors: as in mlx-lm, before bias and penalties; of tokens and logits alone (`LogitsProcessor`).
        states_at: gets copies of states (`Session.copied_states`) at keys that are numbers of tokens of `prompt`.

    Raises:
        MTPError: if the prompt is empty or unknown, the cache cannot be rolled back, or the emission does not suit.
    """
    session, loop = open_loop(
        token_ids(prompt),
        model,
        max_tokens=max_tokens,
        sampling=sampling,
        policy=policy,
        lookup=lookup,
        emission=emission,
        cache=prompt_cache if prompt_cache is not None else model.make_cache(max_kv_size),
        settings=CacheSettings(kv_bits, kv_group_size, quantized_kv_start, prefill_step_size),
        stats=stats,
        constraint=constraint,
        processors=logits_processors or (),
        prefix=prefix,
    )
    yield from _tokens(session, loop, prompt_progress_callback, states_at, keep=prompt_cache is not None)


def _tokens(
    session: Session,
    loop: DecodeLoop | EmitLoop,
    progress: Callable[[int, int], None] | None,
    states_at: dict[int, list[Any]] | None,
    *,
    keep: bool,
) -> Generator[Token, None, None]:
    """Runs the prompt and yields tokens; with `keep`, the cache ends up as `mtp_generate_step` describes."""
    n_prompt = len(session.tokens)
    try:
        session.prefill(progress, states_at)
        try:
            yield from loop.tokens()
        except GeneratorExit:  # closed by the consumer
            if keep:
                session.settle(n_prompt + loop.n_yielded)
            raise
        if keep:
            session.settle(n_prompt + loop.n_yielded)
    except BaseException:  # Ctrl-C too, and inside `settle`
        session.rewind()
        raise


def open_loop(
    ids: list[int],
    model: AttachedModel,
    *,
    max_tokens: int,
    sampling: SamplingConfig | None,
    policy: Policy | None,
    lookup: TextDrafter | None,
    emission: Emission | None,
    cache: list[Any],
    settings: CacheSettings,
    stats: DecodeStats | None,
    constraint: Constraint | None,
    processors: Sequence[LogitsProcessor] = (),
    prefix: Sequence[int] = (),
    shared_drafts: int = 0,
) -> tuple[Session, DecodeLoop | EmitLoop]:
    """Sets up a generation whose prompt has not run yet; arguments and errors as for `mtp_generate_step`.

    Args:
        shared_drafts: most drafts that passes shared with other sequences may ask of the model's own drafter.
    """
    policy, emission = policy or FixedPolicy("plain", 0), emission or Emission()
    if constraint is not None and not emission.lossless:
        raise MTPError("a grammar needs verified drafts: use `emission` verified")
    if processors and not emission.lossless:
        raise MTPError("`logits_processors` need verified drafts: use `emission` verified")
    source = source_of(model)
    own_drafts = max(policy.own_drafts, shared_drafts)
    verifying = emission.lossless and max(policy.max_drafts, shared_drafts) > 0
    sampling = sampling_for(source, sampling or SamplingConfig(), verifying)
    check_ids([token for token, _ in sampling.logit_bias], model.vocab_size, "logit_bias")
    picker = Picker(sampling if emission.lossless else emission.greedy(sampling), model.exact)
    stats = DecodeStats() if stats is None else stats

    def open_drafter(start: int) -> Drafter:
        assert source is not None
        drafter = source.open(model, picker, own_drafts, start, verified=emission.lossless)
        drafter.begin(prefix, start)
        if drafter.note:
            stats.fallbacks[drafter.note] += 1
        return drafter

    wanted = source is not None and own_drafts > 0
    opened = open_drafter if wanted else None
    session = Session(model, picker, ids, cache, settings, opened, constraint, processors, len(prefix))
    if source is not None and wanted:
        source.check_caches(cache)
    if emission.lossless:
        return session, DecodeLoop(session, policy, lookup, stats, max_tokens)
    sampler = Picker(sampling) if emission.first_token_sampling else None
    return session, EmitLoop(session, emission, policy.max_drafts, sampler, stats, max_tokens)


def sampling_for(source: DraftSource | None, sampling: SamplingConfig, drafting: bool) -> SamplingConfig:
    """`sampling` with its noise filled in: the requested one, else the one that the drafter was trained for.

    Raises:
        MTPError: if the drafter is used and cannot draft for this sampling.
    """
    if source is None:
        return sampling if sampling.noise else replace(sampling, noise="gumbel")
    if drafting:
        source.check_sampling(sampling)
    return sampling if sampling.noise else replace(sampling, noise=source.noise)


def token_ids(prompt: mx.array | np.ndarray | Sequence[int]) -> list[int]:
    """The token ids of one sequence as a list of ints.

    Raises:
        MTPError: if `prompt` is not one-dimensional or holds anything but integers.
    """
    values = cast("list[int]", prompt.tolist()) if isinstance(prompt, mx.array | np.ndarray) else prompt
    try:
        return [operator.index(token) for token in values]
    except TypeError:
        raise MTPError("`prompt` must be one sequence of integer token ids") from None


class DecodeLoop:
    """The state of one generation between steps.

    Attributes:
        n_yielded: tokens yielded so far.
        leaving: set to make `tokens` end once every committed token is yielded and no pass runs ahead; it can be
            called again later.
    """

    def __init__(
        self,
        session: Session,
        policy: Policy,
        lookup: TextDrafter | None,
        stats: DecodeStats,
        max_tokens: int,
    ) -> None:
        self._session, self._policy, self._lookup, self._stats = session, policy, lookup, stats
        self._max_tokens = max_tokens
        self.n_yielded = 0
        self.leaving = False
        source = source_of(session.attached)
        self._own = "" if source is None else source.name  # the model's own drafter
        self._proposal = Proposal(self._own)
        if lookup is not None:
            lookup.extend(session.tokens)

    def tokens(self) -> Generator[Token, None, None]:
        """Yields tokens up to max_tokens; the consumer closes the generator to stop earlier."""
        self._policy.begin(self._session.next_position - 1, branches=self._may_branch())
        while self._left() > 0 and not self.leaving:
            started = time.perf_counter()
            proposal, layout = self._plan()
            if layout == Layout.plain() and self._session.constraint is None:  # its mask needs the last token
                yield from self._plain_stretch(started)
            else:
                yield from self._step(proposal, layout, started)

    def _may_branch(self) -> bool:
        """Whether drafts may have branches; not found out where all drafters make chains."""
        texts = self._lookup is not None and self._lookup.branching
        return (texts or self._policy.own_drafts > 0) and not self._session.why_chains

    def _count_yield(self) -> None:
        self.n_yielded += 1
        if self.n_yielded % CLEAR_EVERY == 0:
            mx.clear_cache()

    def _left(self) -> int:
        return self._max_tokens - self.n_yielded if self._max_tokens >= 0 else 1 << 30

    def _plan(self) -> tuple[Proposal, Layout]:
        """The proposal to verify next, and its layout."""
        proposal, layout = self._policy.choose(self.proposals(self._policy.max_drafts))
        if layout.width == 1 and not layout.parents:
            return proposal, layout
        reason = self._session.why_chains
        if not reason:
            return proposal, layout
        if reason not in self._stats.fallbacks:
            self._stats.fallbacks[reason] += 1
        return without_branches(proposal, layout)

    def proposals(self, most: int) -> list[Proposal]:
        """The drafters' proposals, at most `most` drafts each and no more than the next pass may verify."""
        proposals = [self._proposal]
        if self._lookup is not None:
            found = self._lookup.tree(most)
            if found.tokens:
                proposals.append(Proposal(self._lookup.name, found))
        limit = self._session.draft_limit()
        most = self._left() - 1 if limit is None else min(limit, self._left() - 1)
        return [proposal.cut(most) for proposal in proposals]

    def _step(self, proposal: Proposal, layout: Layout, started: float) -> Generator[Token, None, None]:
        drafts = proposal.drafts[: layout.drafts]
        result = speculative_step(self._session, layout, drafts)
        self._policy.observe(proposal, layout, result.tokens, time.perf_counter() - started)
        yield from self.take(proposal, layout, result)

    def take(self, proposal: Proposal, layout: Layout, result: StepResult) -> Generator[Token, None, None]:
        """Yields the tokens of a step that `session` has committed, which verified drafts of `proposal`."""
        sources = [proposal.source_of(node) for node in range(layout.drafts)]
        choices = proposal.tree.choices if layout.parents else [1] * layout.drafts
        self._stats.record(layout, result.kept, sources, self._own, result.rows, choices)
        self._proposal = Proposal(self._own, result.fresh)
        if self._lookup is not None:
            self._lookup.extend(result.tokens)
        for index, token in enumerate(result.tokens):
            depth = index + 1 if index < result.n_accepted else 0
            self._count_yield()
            node = result.kept[depth] - 1
            drafter, choice = (sources[node], choices[node]) if depth else ("", 0)
            yield Token(token, result.logits[index], depth > 0, depth, drafter, choice)

    def _plain_stretch(self, started: float) -> Generator[Token, None, None]:
        """Plain steps until the policy wants drafts, each started before the token of the one before is read.

        The time that the consumer takes between two tokens is not counted.
        """
        session = self._session
        ahead = session.plain_pass(mx.array(session.tokens[-1:], dtype=mx.int32), 0)
        mx.async_eval(ahead[0])
        self._proposal = Proposal(self._own)
        last = planned = False  # the plan that led here was for the same text
        while not last:
            pick, logits = ahead
            last = self.leaving or self._left() <= 1
            last = last or self._policy.interrupts_plain() or (planned and self._lookup_wanted())
            planned = True
            if not last:
                ahead = session.plain_pass(pick, 1)
                mx.async_eval(ahead[0])
            token = int(cast(int, pick.item()))
            session.tokens.append(token)
            self._stats.record(Layout.plain(), [0], [])
            self._policy.observe(self._proposal, Layout.plain(), [token], time.perf_counter() - started)
            if self._lookup is not None:
                self._lookup.extend([token])
            self._count_yield()
            yield Token(token, logits[0], False, 0)
            started = time.perf_counter()

    def _lookup_wanted(self) -> bool:
        """Whether text alone gives drafts that are worth a speculative step."""
        return self._lookup is not None and self._plan()[1] != Layout.plain()
