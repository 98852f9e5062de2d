"""Texts that share passes, as the server decodes them: each joins and leaves at a step of its own."""

from __future__ import annotations

from collections.abc import Iterable

from mtp_mlx import api
from mtp_mlx.decode.loop import DecodeLoop, open_loop
from mtp_mlx.decode.session import CacheSettings
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.step import Token
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.planning.experience import Experience
from mtp_mlx.serve.batch import Batch, Member
from mtp_mlx.serve.batch_plan import BatchPlan, batch_drafting
from text_search import models
from text_search.case import Case, Text
from text_search.drafting import COST, knowing
from text_search.running import Written, arguments, tokenizer

MOST_STEPS = 1000


class _Running:
    """One text on its way through a batch."""

    def __init__(self, case: Case, text: Text, truth: Written, model: AttachedModel) -> None:
        self.text, self.stats = text, DecodeStats()
        with knowing(case, model, truth.tokens, len(text.prompt), len(text.prompt)):
            rows = case.rows if case.layout == "tree" else None
            drafting = api.plan_drafting(
                model, *arguments(case), self.stats, case.lookup != "none", rows=rows
            )
            self.session, loop = open_loop(
                list(text.prompt),
                model,
                max_tokens=text.max_tokens,
                sampling=case.picked_by,
                policy=drafting.policy,
                lookup=drafting.lookup,
                emission=None,
                cache=models.new_cache(case, model),
                settings=CacheSettings(prefill_step_size=case.prefill_step_size),
                stats=self.stats,
                constraint=None,
            )
        assert isinstance(loop, DecodeLoop)
        self.loop = loop
        self.member: Member | None = None
        self.tokens: list[Token] = []
        self.steps = 0

    def take(self, tokens: Iterable[Token]) -> bool:
        """Adds tokens up to an end-of-text token; returns whether the text is at its end."""
        for item in tokens:
            if self.done:
                break
            self.tokens.append(item)
        return self.done

    @property
    def done(self) -> bool:
        """Whether the text has all its tokens, or an end-of-text token."""
        ended = bool(self.tokens) and self.tokens[-1].token in tokenizer().eos_token_ids
        return ended or len(self.tokens) >= self.text.max_tokens


def found(case: Case, truths: list[Written]) -> tuple[list[Written], DecodeStats]:
    """The texts as a batch writes them, and what happened."""
    model = models.attached(case)
    running = [_Running(case, text, truth, model) for text, truth in zip(case.texts, truths)]
    batch = Batch(model, _plan(case, model))
    for clock in range(MOST_STEPS):
        for one in running:
            if one.text.joins == clock:
                one.session.prefill()
                one.member = batch.join(one.session, one.loop)
        if batch.members:
            _step(batch, running)
        elif clock > max(text.joins for text in case.texts):
            break
    stats = DecodeStats()
    for one in running:
        for counts, own in ((stats.submitted, one.stats.submitted), (stats.accepted, one.stats.accepted)):
            counts.append(sum(own))
    texts = [Written([i.token for i in one.tokens], logits=[i.logits for i in one.tokens]) for one in running]
    return texts, stats


def _step(batch: Batch, running: list[_Running]) -> None:
    """One pass over the members; those that are done or have their time leave."""
    members = list(batch.members)
    for member, tokens in zip(members, batch.step()):
        one = next(each for each in running if each.member is member)
        one.steps += 1
        done = one.take(tokens)
        if done or one.steps == one.text.alone_after:
            batch.leave(member)
            if not done:
                one.take(one.loop.tokens())


def _plan(case: Case, model: AttachedModel) -> BatchPlan:
    layout, drafts = arguments(case)
    drafting = batch_drafting(model, layout, drafts, lookup=case.lookup != "none")
    return BatchPlan(drafting, COST, Experience.fresh(drafting.own, drafting.slots or drafting.chain, []))
