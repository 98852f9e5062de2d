"""Measures which convention converted heads were trained for: their acceptance on the base's own greedy text.

RMSNorm hides a wrong hidden state, a wrong order or norms stored around zero: the head still drafts fluent text,
but few drafts are accepted. So the base continues a few prompts greedily and head 1 drafts every token of that text,
given the true tokens before it (teacher-forced). If few drafts are right, the other conventions are tried; if they
are, the second draft shows which state the heads were trained to pass on.

Legend: T tokens of a text, P of them prompt, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step

from mtp_mlx.adapter_folder import read_header, write_header
from mtp_mlx.convert.heads.variant import Variant, how_to_mend
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.folder import load
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.seams import find_seams

# To be put into the model's chat template.
PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a fox and a crow.",
    "Explain how a bicycle stays upright.",
    "List five things to pack for a week in the mountains.",
    "def fibonacci(n):",
    "Translate into French: The library opens at nine in the morning.",
    "What is 17 times 23? Show each step.",
    "The history of the steam engine begins",
)
TOKENS = 64  # of each continuation
_LAST_NORMS = ("norm", "norm_f")  # names in trunks
RECYCLED = ("normed", "raw", "trunk")  # see `HeadConvention.recycled_hidden`
LOW = 0.5  # below this acceptance of head 1 the other conventions are tried
BETTER = 0.1  # another convention is named only if its acceptance is higher by this much


Text = tuple[list[int], int]  # ids of a prompt and what follows, and how many are the prompt's


@dataclass
class Verification:
    """What was measured.

    Attributes:
        written: the convention in the folder.
        acceptance: of each depth, given that the drafts before it were accepted; ends where no draft got that far.
        tokens: drafts of head 1 that were compared.
        others: acceptance of head 1 under other conventions; empty if it is not low under the written one.
        second: acceptance of the second draft by the state it takes, "normed", "raw" or "trunk"; empty if that of
            head 1 is low, or if heads have no output norm.
        recycled: the state in the folder's convention.
    """

    written: Variant
    acceptance: list[float]
    tokens: int
    others: dict[Variant, float] = field(default_factory=dict)
    second: dict[str, float] = field(default_factory=dict)
    recycled: str = ""

    @property
    def fits_better(self) -> Variant | None:
        """The convention that the weights were trained for, if that is clearly not the written one."""
        best = max(self.others, key=lambda variant: self.others[variant], default=None)
        return best if best is not None and self.others[best] > self.acceptance[0] + BETTER else None

    @property
    def recycles_better(self) -> str | None:
        """The state that the second draft was trained on, if that is clearly not the written one."""
        best = max(self.second, key=lambda state: self.second[state], default=None)
        clear = best is not None and self.second[best] > self.second[self.recycled] + BETTER
        return best if clear else None

    def lines(self) -> list[str]:
        """The report for people; it names the arguments of a conversion that would fit better."""
        depths = " / ".join(f"{value:.2f}" for value in self.acceptance)
        lines = [f"verify: acceptance per depth {depths} on {self.tokens} tokens ({self.written})"]
        for variant, value in sorted(self.others.items(), key=lambda item: -item[1]):
            lines.append(f"verify: acceptance of head 1 would be {value:.2f} with {variant}")
        better = self.fits_better
        if better is not None:
            mend = how_to_mend(self.written, better)
            lines.append(f"verify: the weights were trained for {better}, not for {self.written}; {mend}")
        elif self.others:
            lines.append(
                "verify: no convention fits clearly better: the heads are weak, damaged, or of another base model"
            )
        for state, value in self.second.items():
            written = " (written)" if state == self.recycled else ""
            lines.append(
                f"verify: acceptance of the second draft is {value:.2f} with the {state} state{written}"
            )
        if self.recycles_better is not None:
            lines.append(f"verify: convert again with `head_recycled` {self.recycles_better}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """For mtp_config.json."""
        report: dict[str, Any] = {"tokens": self.tokens, "acceptance": self.acceptance}
        if self.second:
            report["second draft by its state"] = self.second
        if self.others:
            report["head 1 otherwise"] = {str(variant): value for variant, value in self.others.items()}
            report["fits better"] = None if self.fits_better is None else str(self.fits_better)
        return report


def verify_heads(
    model: nn.Module,
    tokenizer: Any,
    heads: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: int = TOKENS,
) -> Verification:
    """Measures `heads` on the greedy continuations of the bare model `model`.

    Args:
        tokenizer: of the model; its end-of-sequence ids end a continuation.
        prompts: token ids of each prompt.
        tokens: of each continuation, at most.

    Raises:
        MTPError: not a cascade on the state before or after the trunk's last norm; or no continuation is long enough
            to draft anything.
    """
    _check_kind(heads)
    return measure_heads(model, heads, own_texts(model, tokenizer, prompts, tokens))


def measure_heads(
    model: nn.Module, heads: nn.Module, texts: Sequence[Text], low: float = LOW
) -> Verification:
    """As `verify_heads`, on texts by `own_texts`.

    Args:
        low: acceptance of head 1 below which the other conventions are tried.
    """
    heads = _check_kind(heads)
    attached = attach(model, heads)
    try:
        rows = [_Rows.of(attached, heads, ids, start) for ids, start in texts if len(ids) > start + 1]
        if not rows:
            raise MTPError(
                "the model ends its answer to every prompt at once, so there is no text to measure the heads on"
            )
        written = Variant.of(heads.convention)
        acceptance = _acceptance(attached, heads, rows, written.first_hidden, heads.drafts)
        result = Verification(written, acceptance, sum(row.count for row in rows))
        result.recycled = heads.convention.recycled_hidden
        if acceptance[0] < low:
            for variant in _variants(written, heads, can_be_before_norm=rows[0].before_norm is not None):
                with _as_if(heads, written, variant):
                    found = _acceptance(attached, heads, rows, variant.first_hidden, 1)
                result.others[variant] = found[0]
        if acceptance[0] >= LOW and "norm_out" in heads.heads[0]:
            result.second = _second_draft(attached, heads, rows, written.first_hidden)
        return result
    finally:
        attached.detach()


def _check_kind(heads: nn.Module) -> MTPHeads:
    """The heads, if they can be measured."""
    before_last = isinstance(heads, MTPHeads) and heads.convention.first_hidden == "before-last-layer"
    if not isinstance(heads, MTPHeads) or before_last or heads.tapped_layers:
        raise MTPError(
            f"heads of the family {heads.convention.family} cannot be measured: only cascades that take the state "
            "before or after the trunk's last norm alone can"
        )
    return heads


def verify_folder(
    model: nn.Module, tokenizer: Any, folder: Path, prompts: Sequence[Sequence[int]], tokens: int = TOKENS
) -> Verification:
    """Measures the heads of the adapter folder `folder` and writes the result into its config.

    Args:
        model, tokenizer, prompts, tokens: as for `verify_heads`.

    Raises:
        MTPError: no heads there, heads of another base, or of a kind that cannot be measured.
    """
    return measure_folder(model, folder, own_texts(model, tokenizer, prompts, tokens))


def measure_folder(model: nn.Module, folder: Path, texts: Sequence[Text], low: float = LOW) -> Verification:
    """As `verify_folder`, on texts by `own_texts`; `low` as for `measure_heads`."""
    heads, header = load(folder, read_header(folder), model)
    if not isinstance(heads, MTPHeads):
        raise MTPError(
            f"{folder}: heads of kind '{heads.convention.kind}' have no conventions that could be tried"
        )
    bare = attach(model)
    heads.set_dtype(bare.embed(mx.zeros((1,), dtype=mx.int32)).dtype)  # as `load` does
    bare.detach()
    result = measure_heads(model, heads, texts, low)
    measurements = {**header.measurements, "verify": result.to_json()}
    by_precision = {**header.acceptance_by_precision, bare.precision: result.acceptance}
    header = replace(header, acceptance=result.acceptance, measurements=measurements)
    write_header(folder, replace(header, acceptance_by_precision=by_precision))
    return result


# --- texts and states ---------------------------------------------------------------------------------------


def own_texts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int = TOKENS
) -> list[Text]:
    """Each prompt with the model's own greedy continuation of at most so many tokens."""
    texts = []
    for prompt in prompts:
        ids = list(prompt)
        for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=tokens):
            ids.append(int(token))
            if int(token) in tokenizer.eos_token_ids:
                break
        texts.append((ids, len(prompt)))
    return texts


@dataclass
class _Rows:
    """A text and the trunk's states over it.

    Attributes:
        ids: [T] int32. start: P.
        embeddings, after_norm: [1, T, D]. before_norm: [1, T, D], or None where the trunk has no last norm.
    """

    ids: mx.array
    start: int
    embeddings: mx.array
    after_norm: mx.array
    before_norm: mx.array | None

    @classmethod
    def of(cls, attached: AttachedModel, heads: MTPHeads, ids: list[int], start: int) -> _Rows:
        """Runs the trunk over a text."""
        array = mx.array(ids, dtype=mx.int32)
        trunk = find_seams(attached.model).trunk
        with _last_norm_seen(trunk) as seen:
            after = trunk(array[None])
        before = seen[-1] if seen else None
        embeddings = heads.heads[0].embed(array, attached.embed)[None]
        mx.eval(after, embeddings, [] if before is None else before)
        return cls(array, start, embeddings, after, before)

    @property
    def first(self) -> int:
        """The first row that drafts in decoding: its token is the first of the continuation, its draft the second."""
        return self.start - 1

    @property
    def count(self) -> int:
        """How many drafts of head 1 are compared."""
        return len(self.ids) - 2 - self.first


class _Seen(nn.Module):
    """A norm that records its input."""

    def __init__(self, norm: nn.Module, seen: list[mx.array]) -> None:
        super().__init__()
        self.norm, self._seen = norm, seen

    def __call__(self, x: mx.array) -> mx.array:
        self._seen.append(x)
        return cast(mx.array, self.norm(x))


@contextmanager
def _last_norm_seen(trunk: nn.Module) -> Iterator[list[mx.array]]:
    """A list that collects the inputs of the trunk's last norm inside the block."""
    seen: list[mx.array] = []
    name = next((name for name in _LAST_NORMS if isinstance(trunk.get(name), nn.Module)), None)
    if name is None:
        yield seen
        return
    norm = trunk[name]
    trunk[name] = _Seen(norm, seen)
    try:
        yield seen
    finally:
        trunk[name] = norm


# --- acceptance ---------------------------------------------------------------------------------------------


def _acceptance(
    attached: AttachedModel, heads: MTPHeads, rows: Sequence[_Rows], first_hidden: str, depths: int
) -> list[float]:
    """Acceptance of each depth, among the rows whose drafts before it were right; at least one number."""
    right, seen = [0] * depths, [0] * depths
    for text in rows:
        hidden = text.before_norm if first_hidden == "pre-norm" else text.after_norm
        assert hidden is not None
        alive = mx.ones((text.count,), dtype=mx.bool_)
        for k, z in enumerate(heads.cascade(text.embeddings, hidden, depths)):
            known = text.ids[text.first + k + 2 :]  # what depth k + 1 should draft
            if not len(known):
                break
            unembed = heads.at_depth(k + 1).get("lm_head", attached.head)
            picks = mx.argmax(unembed(z[:, text.first : text.first + len(known)])[0], axis=-1)
            alive = alive[: len(known)]
            seen[k] += int(alive.sum())
            alive = alive & (picks == known)
            right[k] += int(alive.sum())
    return [r / s for r, s in zip(right, seen, strict=True) if s]


def _second_draft(
    attached: AttachedModel, heads: MTPHeads, rows: Sequence[_Rows], first_hidden: str
) -> dict[str, float]:
    """Acceptance of the second draft, among the rows whose first was right, by the state that it takes."""
    found = {}
    for state in RECYCLED:
        with heads.recycling(state):
            acceptance = _acceptance(attached, heads, rows, first_hidden, 2)
        if len(acceptance) > 1:
            found[state] = acceptance[1]
    return found


def _variants(written: Variant, heads: MTPHeads, can_be_before_norm: bool) -> list[Variant]:
    """All combinations but `written`; without the other order where a quantised weight cannot be taken in halves."""
    hidden = ("post-norm", "pre-norm") if can_be_before_norm else ("post-norm",)
    scales = heads.heads[0].fuse.get("scales")
    whole = scales is not None and scales.shape[1] % 2
    order = (written.stored_order,) if whole else ("embedding", "hidden")
    norms = ((False, False), (True, False), (False, True))
    every = (Variant(state, first, *how) for state, first, how in itertools.product(hidden, order, norms))
    return [variant for variant in every if variant != written]


@contextmanager
def _as_if(heads: MTPHeads, written: Variant, variant: Variant) -> Iterator[None]:
    """Inside the block head 1 is what a conversion under `variant` would have made of the stored weights."""
    head = heads.heads[0]
    before = cast("list[tuple[str, mx.array]]", tree_flatten(head.parameters()))

    def changed(name: str, value: mx.array) -> mx.array:
        if name.startswith("fuse.") and variant.stored_order != written.stored_order:
            return mx.concatenate(list(mx.split(value, 2, axis=1))[::-1], axis=1)
        if value.ndim == 1 and "norm" in name.rsplit(".", 2)[-2]:
            return value + int(variant.adds_one(name)) - int(written.adds_one(name))
        return value

    try:
        head.update(tree_unflatten([(name, changed(name, value)) for name, value in before]))
        yield
    finally:
        head.update(tree_unflatten(before))
