"""One sequence being decoded: its tokens, its KV cache, and the forward passes that move both.

Invariant between steps: the cache holds every committed token but the last, the *pending* token; its key and
value are written by the next pass. Rejected rows and slot rows leave by one `keep` (`mtp_mlx.decode.rollback`).

mlx-lm quantises its cache after the pass with which it reached `quantized_kv_start`. Here that happens right
before the next pass, which is the same unless rows are taken back in between: then it must not have happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.generate import maybe_quantize_kv_cache

from mtp_mlx.decode.constraint import Constraint
from mtp_mlx.decode.drafter import HeadDrafter
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.led import led
from mtp_mlx.decode.pick import Picker, leading_run
from mtp_mlx.decode.rollback import LayerCaches
from mtp_mlx.decode.step import CacheSettings, LazyStep, StepResult
from mtp_mlx.drafters.heads.chain import HeadChain
from mtp_mlx.drafters.heads.medusa import MedusaDrafter, MedusaHeads
from mtp_mlx.drafters.heads.parallel import ParallelDrafter, ParallelHeads
from mtp_mlx.drafters.masks.draft import MaskSlotDrafter
from mtp_mlx.drafters.ptp.draft import PTPSlotDrafter
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block, BlockShape, block_shape


def _head_drafter(attached: AttachedModel, picker: Picker, chain: int, start: int) -> HeadDrafter:
    """The drafter for the form that the model's heads have; arguments as `HeadChain`."""
    if isinstance(attached.mtp_heads, MedusaHeads):
        return MedusaDrafter(attached, picker, chain, start)
    if isinstance(attached.mtp_heads, ParallelHeads):
        return ParallelDrafter(attached, picker, chain, start)
    return HeadChain(attached, picker, chain, start)


class Session:
    """Forward passes over one sequence.

    Args:
        attached: the model.
        picker: the target's picker.
        drafter: turns slot latents into drafts; None when no slots will be asked for.
        prompt: token ids not yet in the cache, at least one.
        cache: mlx-lm prompt cache, possibly holding an earlier prefix; updated in place.
        settings: cache options.
        chain: longest chain of MTP heads that layouts will ask for; 0 for none.
        constraint: what every token must satisfy; None for nothing. Not with `plain_pass`, which runs ahead of it.

    Raises:
        MTPError: the prompt is empty, has ids outside the vocabulary, or the cache cannot give rows back.
    """

    def __init__(
        self,
        attached: AttachedModel,
        picker: Picker,
        drafter: MaskSlotDrafter | PTPSlotDrafter | None,
        prompt: list[int],
        cache: list[Any],
        settings: CacheSettings,
        chain: int = 0,
        constraint: Constraint | None = None,
    ) -> None:
        if not prompt:
            raise MTPError("the prompt is empty: give at least one token")
        if max(prompt) >= attached.vocab_size or min(prompt) < 0:
            raise MTPError(f"the prompt has token ids outside the vocabulary of {attached.vocab_size}")
        self._caches = LayerCaches(cache, getattr(attached.model, "model_type", "?"))
        self.attached, self.picker, self.drafter = attached, picker, drafter
        self.cache, self._settings = cache, settings
        self.start = self.cached  # tokens of an earlier prefix
        if self._caches.windowed and settings.kv_bits is not None:
            raise MTPError(
                "this model's layers with a sliding window cannot have a quantised cache, in mlx-lm either: "
                "leave kv_bits out"
            )
        self.constraint = constraint
        self.chain = _head_drafter(attached, picker, chain, self.start) if chain else None
        self._has_run = self._settled = False
        self.tokens = list(prompt)  # committed since then, the pending one last
        self._n_prompt = len(prompt)

    @property
    def cached(self) -> int:
        """Tokens in the cache."""
        return self._caches.length

    def prefill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Runs all of the prompt but its last token, in chunks."""
        for done in self.prefill_chunks():
            if progress is not None:
                progress(done, len(self.tokens))
        if progress is not None:
            progress(len(self.tokens), len(self.tokens))

    def prefill_chunks(self) -> Iterator[int]:
        """As `prefill`; yields how many tokens of the prompt have run, after every chunk."""
        total = len(self.tokens)
        done = 0
        while done < total - 1:
            chunk = self.tokens[done : min(total - 1, done + self._settings.prefill_step_size)]
            self._forward(Block.real(mx.array([chunk])))
            if self.chain is not None:
                self.chain.observe(self.attached.head_input, self.tokens)
            self._evaluate_cache()
            done += len(chunk)
            mx.clear_cache()
            yield done
        if self.chain is not None:
            self.chain.catch_up(self.tokens)

    def _forward(self, block: Block) -> mx.array:
        """[B, R, D] latents of a pass that appends the block's rows to the cache."""
        n_rows = block.ids.shape[1]
        self._caches.mark(n_rows)  # first: rows that are quantised are not taken back
        if self._has_run:  # mlx-lm never quantises before the first pass
            self._quantize()
        self._has_run = True
        hidden = self.attached.forward(block, self.cache)
        self._caches.check_pass(n_rows)
        return hidden

    def _evaluate_cache(self) -> None:
        """A lazy array belongs to the thread that made it; the cache may go on to another."""
        mx.eval([layer.state for layer in self.cache])

    def _quantize(self) -> None:
        settings = self._settings
        maybe_quantize_kv_cache(
            self.cache, settings.quantized_kv_start, settings.kv_group_size, settings.kv_bits
        )

    def draft_limit(self) -> int | None:
        """Most drafts the next block may verify, or None for any number.

        mlx-lm quantises the cache once it has grown to `quantized_kv_start`; a block must not straddle that
        point, or its later rows would see a prefix that plain decoding sees quantised.
        """
        settings = self._settings
        if settings.kv_bits is None:
            return None
        if self.cached >= settings.quantized_kv_start:
            quantised_by_then = self._has_run or not any(hasattr(c, "to_quantized") for c in self.cache)
            return None if quantised_by_then else 0
        return settings.quantized_kv_start - self.cached - 1

    # --- plain decoding, one step ahead of the host ---------------------------------------------------------

    def plain_pass(self, pending: mx.array, n_ahead: int) -> tuple[mx.array, mx.array]:
        """One ordinary pass over the pending token, lazily.

        Args:
            pending: [1] int32, not necessarily read by the host yet.
            n_ahead: committed tokens the host has not been told of yet (0 or 1).

        Returns:
            pick [1] int32 and logits [1, V].
        """
        position = self.cached + 1
        hidden = self._forward(Block.real(pending[None]))
        if self.chain is not None:
            self.chain.observe(self.attached.head_input, self.tokens)
        logits = self.attached.head(hidden)[0]  # [1, V]
        history = None
        if self.picker.history_size:
            known = self._recent(self.tokens, self.picker.history_size - n_ahead)
            unread = [pending] if n_ahead else []
            history = mx.concatenate([mx.array(known, dtype=mx.int32), *unread])[None]
        pick = self.picker.pick(logits, mx.array([position]), history)
        return led(self.attached.peers, pick), logits

    # --- unverified emission --------------------------------------------------------------------------------

    def open_pass(self, slots: int) -> tuple[mx.array, BlockShape]:
        """A pass over every committed token that the cache lacks, with mask slots behind the last one; lazily.

        The slots' keys and values are taken back at once, so the cache then holds every committed token.

        Returns:
            latents [R, D] and the rows' shape; its last real row is the last committed token.
        """
        pending = self.tokens[self.cached - self.start :]
        shape = block_shape(len(pending) - 1, (0,) * (len(pending) - 1) + (slots,))
        rows = mx.array(pending, dtype=mx.int32)
        hidden = self._forward(Block.decode(rows, shape, self.cached, self.attached.vocab_size))[0]  # [R, D]
        self.trim(slots)
        return hidden, shape

    def history(self) -> mx.array | None:
        """[1, C] the last committed tokens, or None without penalties."""
        return self._histories([])

    # --- a speculative step ---------------------------------------------------------------------------------

    def step(self, layout: Layout, drafts: list[int]) -> StepResult:
        """Verifies `drafts` (layout.drafts of them), commits what is accepted and drafts again."""
        start = self.cached
        hidden = self._forward(self.block(layout, drafts, start))[0]  # [R, D]
        logits = self.attached.head(hidden[None, : layout.real_rows])[0]  # [1 + d, V]
        found = self.judge(layout, drafts, start, hidden, logits, self.attached.head_input)
        mx.eval(found.integers, found.confidences)  # the step's one host read
        result = self.commit(layout, found)
        self._caches.keep(1 + result.n_accepted)
        return result

    def block(self, layout: Layout, drafts: list[int], start: int) -> Block:
        """The rows of a step whose pending token stands at position `start`."""
        shape = self.shape(layout)
        rows = mx.array([self.tokens[-1], *drafts], dtype=mx.int32)
        block = Block.decode(rows, shape, start, self.attached.vocab_size)
        if isinstance(self.drafter, PTPSlotDrafter) and layout.slot_rows:
            block = replace(block, uniforms=self.drafter.uniforms(shape, start))
        return block

    def judge(
        self,
        layout: Layout,
        drafts: list[int],
        start: int,
        hidden: mx.array,
        logits: mx.array,
        head_input: mx.array,
    ) -> LazyStep:
        """What a pass says about `drafts`, and fresh drafts; lazily.

        Args:
            layout: of the pass. It may have room for more drafts than there are.
            drafts: d token ids.
            start: absolute position of the pending token.
            hidden: [R, D] latents of the pass.
            logits: [>= 1 + d, V] of its real rows.
            head_input: [1, >= 1 + d, D] what MTP heads take of them.
        """
        n_real = 1 + len(drafts)
        logits, head_input = logits[:n_real], head_input[:, :n_real]
        rows = mx.array([self.tokens[-1], *drafts], dtype=mx.int32)
        positions = mx.arange(start + 1, start + 1 + n_real)
        history = self._histories(drafts)
        picks, accepted = self._verify(self._allowed(logits, drafts), positions, history, rows)
        own = None if history is None else history[accepted]
        fresh, confidences = self._draft(
            layout, hidden, head_input, picks, accepted, positions[accepted], own
        )
        integers = led(self.attached.peers, mx.concatenate([accepted.reshape(1), picks, fresh]))
        confidences = led(self.attached.peers, confidences)
        return LazyStep(integers, confidences, logits, head_input, hidden.shape[0])

    def commit(self, layout: Layout, found: LazyStep) -> StepResult:
        """Commits what was accepted and the target's own pick; the caches' rows are the caller's business."""
        n_accepted, *values = cast("list[int]", found.integers.tolist())
        n_real = found.logits.shape[0]
        count = layout.chain or layout.slots[n_accepted]
        tokens = values[: n_accepted + 1]
        self.tokens += tokens
        if self.chain is not None and layout.chain:
            self.chain.commit(n_accepted)
        elif self.chain is not None:
            self.chain.observe(found.head_input[:, : n_accepted + 1], self.tokens)
        if self.constraint is not None:
            self.constraint.commit(tokens)
        return StepResult(
            tokens=tokens,
            n_accepted=n_accepted,
            drafts=values[n_real : n_real + count],
            confidences=cast("list[float]", found.confidences.tolist())[:count],
            logits=found.logits,
            rows=found.rows,
        )

    def _allowed(self, logits: mx.array, drafts: list[int]) -> mx.array:
        """[1 + d, V] logits, -inf where the constraint forbids a token after the drafts before it."""
        if self.constraint is None:
            return logits
        allowed = mx.array(self.constraint.allowed(drafts))
        return mx.where(allowed, logits, mx.array(-mx.inf, dtype=logits.dtype))

    def shape(self, layout: Layout) -> BlockShape:
        """The rows of a layout, with what the drafter's slot groups start with."""
        lead = self.drafter.lead if isinstance(self.drafter, PTPSlotDrafter) else 0
        return block_shape(layout.drafts, layout.slots, lead)

    def _draft(
        self,
        layout: Layout,
        hidden: mx.array,
        head_input: mx.array,
        picks: mx.array,
        accepted: mx.array,
        position: mx.array,
        history: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        """Ids and confidences of fresh drafts, lazily; none if the layout asks for none.

        Args:
            hidden: [R, D] latents of the block.
            head_input: [1, 1 + d, D] what MTP heads take.
            picks: [1 + d] int32, the target's picks.
            accepted: int32 scalar a.
            position: int32 scalar, of picks[a].
            history: [C] int32 tokens before picks[a], or None without penalties.

        Raises:
            MTPError: the layout asks for a drafter that there is none of.
        """
        if layout.chain:
            if self.chain is None:
                raise MTPError("this layout drafts with MTP heads, which the policy has not announced")
            return self.chain.propose(
                head_input, picks, accepted, position, history, self.tokens, layout.chain
            )
        if layout.slot_rows:
            if self.drafter is None:
                raise MTPError("this layout has mask slots, and this model no mask-token adapter to use them")
            shape = self.shape(layout)
            return self.drafter.propose(hidden, shape, accepted, picks[accepted], position, history)
        return mx.zeros((0,), dtype=mx.int32), mx.zeros((0,))

    def _verify(
        self, logits: mx.array, positions: mx.array, history: mx.array | None, tokens: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The target's picks [1 + d] and how many drafts they accept (a scalar), lazily.

        Args:
            logits: [1 + d, V] of the real rows.
            positions: [1 + d] int32 of the tokens picked.
            history: [1 + d, C] for penalties, or None.
            tokens: [1 + d] int32, the pending token and the drafts.
        """
        kernels, picker = self.attached.kernels, self.picker
        plainly = self.constraint is None and picker.draws_plainly(logits.shape[-1])
        if kernels is not None and plainly:
            found = kernels.attempt(
                "verify_tail", logits, tokens, picker.config.temperature, picker.noise_keys(positions)
            )
            if found is not None:
                return found[0], found[1].reshape(())
        picks = picker.pick(logits, positions, history)
        return picks, leading_run(picks, tokens[1:])

    def trim(self, rows: int) -> None:
        """Takes the newest rows back from every layer's cache; at most those of the newest pass."""
        self._caches.keep(self.cached - self._caches.marked - rows)

    @property
    def next_position(self) -> int:
        """Absolute position of the token after the pending one."""
        return self.start + len(self.tokens)

    def lend_caches(self) -> list[Any]:
        """Every layer's cache, which somebody else goes on with; this session's are empty until `take_caches`."""
        lent = list(self.cache)
        self.cache[:] = self.attached.make_cache()
        return lent

    def take_caches(self, layers: list[Any]) -> None:
        """The caches after steps that were run elsewhere: all committed tokens but the pending one."""
        self.cache[:] = layers
        self._caches.mark(0)

    @property
    def generated(self) -> list[int]:
        """Committed tokens that are not of the prompt."""
        return self.tokens[self._n_prompt :]

    def settle(self, n_committed: int) -> None:
        """Ends the session: the cache then holds exactly the first `n_committed` tokens of `self.tokens`.

        Where it is cut short, as by Ctrl-C, `rewind` must follow.
        """
        surplus = self.cached - (self.start + n_committed)
        if surplus > 0:
            self.trim(surplus)
        elif surplus < 0:
            self._forward(Block.real(mx.array([self.tokens[n_committed + surplus : n_committed]])))
        if self._has_run:
            self._quantize()
        self._evaluate_cache()
        self._settled = True
        self._caches.hand_back()
        self._evaluate_cache()

    def rewind(self) -> None:
        """Ends a session whose newest pass may have been cut short, as by Ctrl-C, without running another.

        The cache then holds what it held before that pass; where the session was settled, it stays as it is.
        """
        if not self._settled:
            self._caches.keep(0)
        self._caches.hand_back()

    def _histories(self, drafts: list[int]) -> mx.array | None:
        """[1 + d, C] tokens before each real row's pick, or None without penalties."""
        size = self.picker.history_size
        if not size:
            return None
        rows = [self._recent(self.tokens + drafts[:count], size) for count in range(len(drafts) + 1)]
        return mx.array(np.array(rows, dtype=np.int32))

    @staticmethod
    def _recent(tokens: list[int], size: int) -> list[int]:
        """The last `size` tokens, padded on the left with -1."""
        recent = tokens[-size:] if size else []
        return [-1] * (size - len(recent)) + recent
