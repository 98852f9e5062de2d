"""Training MTP heads on a frozen trunk: plain MTP, MTP-D's self-distillation, looped extension (arXiv 2603.23911)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mtp_mlx.adapter_folder import read_header
from mtp_mlx.drafters.heads.agreement import measure_heads
from mtp_mlx.drafters.heads.build import block_spec
from mtp_mlx.drafters.heads.cascade import MTPHeads, new_heads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.drafters.heads.folder import HeadsConfig, config_of, heads_header, save
from mtp_mlx.drafters.heads.layout import can_supervise
from mtp_mlx.drafters.heads.loss import MTPDistil
from mtp_mlx.drafters.heads.memory import estimate_heads_memory
from mtp_mlx.drafters.heads.options import HeadsSettings
from mtp_mlx.drafters.heads.shape import HeadShape
from mtp_mlx.drafters.heads.start import start_like_trunk
from mtp_mlx.drafters.heads.start_from import read_start
from mtp_mlx.drafters.heads.step import HeadsRunner
from mtp_mlx.drafters.heads.stored import as_stored, quantisation_of
from mtp_mlx.drafters.heads.taps import layer_numbers
from mtp_mlx.drafters.heads.trunk_states import CachedStates, ComputedStates, TrunkStates
from mtp_mlx.model.attach import attach
from mtp_mlx.model.seams import find_seams
from mtp_mlx.model.tensor_fit import check_fit
from mtp_mlx.train.agreement import Agreement
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_vocabulary, same_draft_ids
from mtp_mlx.train.loss import LossParts
from mtp_mlx.train.memory import MemoryEstimate
from mtp_mlx.train.method import Method, Tell
from mtp_mlx.train.plan import StepPlan

CONVENTION = HeadConvention("mtp-mlx")


def first_trained_depth(settings: HeadsSettings) -> int:
    """Depth of the first trained head: 1, or in looped extension that of the first new head.

    Raises:
        MTPError: `settings.start_from` has no heads.
    """
    if settings.extend is None or settings.start_from is None:
        return 1
    return config_of(settings.start_from, read_header(settings.start_from)).count + 1


def supervised(example: Example, settings: HeadsSettings) -> Example:
    """The example, supervised from its second token on if prompts are learnt from too.

    Prompts are not the base model's own text, but they are more text, whose hidden states are computed anyway.
    Measurements and the draft vocabulary use responses only.
    """
    if settings.learn_from == "responses" and not settings.learn_prompts:
        return example
    return replace(example, loss_start=min(example.loss_start, 1))


class TrainHeads(Method[HeadsSettings]):
    """Trains a cascade of heads.

    Raises:
        MTPError: the model cannot be attached to or cannot decode with drafts, or `settings.start_from` does not
            fit.
    """

    def __init__(
        self, model: nn.Module, train: Sequence[Example], settings: HeadsSettings, tell: Tell
    ) -> None:
        super().__init__(model, train, settings, tell)
        self._tell = tell
        self._store: str = settings.store or "bf16"
        self._dtypes: dict[str, mx.Dtype] = {}  # of weights that are not stored in bfloat16
        self._source: dict[str, Any] = {}
        self._held_out: Sequence[Sequence[Example]] = ()
        if settings.learn_prompts:
            tell("`learn_prompts` is now called `learn_from` all")
        bare = attach(model)
        draft_ids = draft_vocabulary(train, settings.draft_vocab or 0, bare.vocab_size)
        bare.detach()  # the trunk of a hybrid model is wrapped even without heads
        self._frozen = 0  # number of heads that are not trained
        heads: DraftHeads
        if settings.start_from is None:
            heads = self._new_heads(model, draft_ids, train[0].tokens)
        else:
            heads = self._start_from(model, settings.start_from, draft_ids, tell)
        heads.set_dtype(mx.float32)
        self.heads = heads
        self.depth = heads.drafts
        self.attached = attach(model, heads)
        self.plan = self.choose_plan(train)
        distil = MTPDistil(
            ce_weight=settings.ce_weight,
            kl_weight=settings.kl_weight,
            top_share=settings.top_share,
            temperature=settings.temperature,
            decay=settings.depth_decay,
        )
        self._states: TrunkStates = ComputedStates(self.attached)
        if settings.hidden_cache is not None:
            cached = CachedStates(self.attached, settings.hidden_cache)
            tell(cached.report(train))
            self._states = cached
        self._runner = HeadsRunner(
            self.attached,
            distil,
            depths=range(self._frozen + 1, self.depth + 1),
            seed=settings.seed,
            states=self._states,
            share=settings.block_share or 1.0,
            chunk_rows=settings.loss_rows,
            plan=self.plan,
        )

    def _new_heads(self, model: nn.Module, draft_ids: mx.array | None, tokens: list[int]) -> MTPHeads:
        """New heads of the shape that the settings say; `tokens`: see `start_like_trunk`."""
        settings = self.settings
        shape, drafts = HeadShape.of(settings), settings.new_drafts()
        count = 1 if shape.shared else drafts
        trunk = find_seams(model).trunk
        taps = layer_numbers(shape.taps, len(trunk.layers))
        self._config = HeadsConfig(
            CONVENTION, [block_spec(trunk, shape.layers)] * count, drafts=drafts, taps=list(taps)
        )
        heads = new_heads(model, count, CONVENTION, draft_ids, layers=shape.layers, taps=taps, drafts=drafts)
        start_like_trunk(heads, model, tokens)
        return heads

    def _start_from(
        self, model: nn.Module, folder: Path, draft_ids: mx.array | None, tell: Tell
    ) -> DraftHeads:
        """The heads of a folder, extended if the settings say so; with `draft_ids` if the settings say how many."""
        start = read_start(folder, model, self.settings, tell)
        self._config, self._source, self._frozen = start.config, start.source, start.frozen
        if self.settings.store is None:
            self._store, self._dtypes = start.store, start.dtypes
        if self.settings.draft_vocab is None:
            return start.heads
        if not same_draft_ids(draft_ids, start.heads.draft_ids):
            tell(f"{folder} was trained with another draft vocabulary; that of this data is used")
        start.heads.set_draft_ids(draft_ids)
        return start.heads

    def _supervised(self, examples: Sequence[Example]) -> list[Example]:
        """See `supervised`."""
        return [supervised(example, self.settings) for example in examples]

    def plans(self) -> Iterator[StepPlan]:
        """See `Method`: whole micro-batches, or one sequence at a time."""
        yield from super().plans()
        yield from (StepPlan(1, count) for count in range(self.most_workers, 0, -1))

    @classmethod
    def settled(cls, settings: HeadsSettings, train: Sequence[Example]) -> HeadsSettings:
        """See `Method`: every position is trained, and new heads are as many as usual, if nothing else is said."""
        count = settings.new_drafts() if settings.start_from is None else settings.heads
        return replace(settings, heads=count, block_share=settings.block_share or 1.0)

    @classmethod
    def can_train_on(cls, settings: HeadsSettings) -> Callable[[Example], bool]:
        """See `Method`: the first head predicts from the third token on, later heads from a later one on."""
        first = first_trained_depth(settings)
        return lambda example: can_supervise(supervised(example, settings), [first])

    @classmethod
    def too_short(cls, settings: HeadsSettings) -> tuple[str, str]:
        """See `Method`."""
        first = first_trained_depth(settings)
        return (
            f"head {first} needs rows of {first + 2} tokens or more",
            f"head {first} predicts from token {first + 2} on, and their responses end before it",
        )

    @property
    def module(self) -> nn.Module:
        """See `Method`."""
        return self.heads

    def tensors(self) -> dict[str, mx.array]:
        """See `Method`."""
        return dict(cast("list[tuple[str, mx.array]]", tree_flatten(self.heads.parameters())))

    def load_tensors(self, tensors: dict[str, mx.array]) -> None:
        """See `Method`."""
        check_fit(self.tensors(), tensors)
        self.heads.update(tree_unflatten(list(tensors.items())))

    def gradients(self, examples: Sequence[Sequence[Example]], step: int) -> tuple[LossParts, dict, int]:
        """See `Method`."""
        return super().gradients([self._supervised(batch) for batch in examples], step)

    def apply_update(self, optimizer: optim.Optimizer, gradients: dict) -> None:
        """See `Method`; copied layers take only the fraction `block_rate` of the update.

        They were trained already, unlike what joins them. With Adam a fraction of the update is a fraction of the
        rate.
        """
        rate = self.settings.block_rate
        if rate == 1:
            optimizer.update(self.heads, gradients)
            return
        before = [head.block_parameters() for head in self.heads.heads]
        optimizer.update(self.heads, gradients)
        for head, old in zip(self.heads.heads, before, strict=True):
            head.set_block(tree_map(lambda one, new: one + rate * (new - one), old, head.block_parameters()))

    def measure(self, batches: Sequence[Sequence[Example]]) -> Agreement:
        """See `Method`."""
        self._held_out = batches
        return measure_heads(self.attached, batches, self.depth, self._states)

    def _acceptance_of(self, heads: DraftHeads) -> list[float]:
        """Acceptance of other heads on the text that was measured last."""
        self.attached.speculator = heads
        try:
            return measure_heads(self.attached, self._held_out, self.depth, self._states).acceptance
        finally:
            self.attached.speculator = self.heads

    def export(self, folder: Path, training: dict[str, Any], acceptance: list[float]) -> None:
        """See `Method`."""
        known = acceptance if self._held_out else []
        heads, found = as_stored(self.heads, self._store, known, self._acceptance_of, self._tell)
        about = self.about({**training, "heads": self.depth}, found or acceptance)
        config = replace(self._config, quantization=quantisation_of(heads))
        header = heads_header(config, self.settings.model, self.fingerprint, source=self._source, **about)
        save(folder, heads, header, self._dtypes)

    def estimate_memory(self, examples: Sequence[Example], plan: StepPlan) -> MemoryEstimate:
        """See `Method`."""
        return estimate_heads_memory(self.attached, self._supervised(examples), self.settings, plan)
