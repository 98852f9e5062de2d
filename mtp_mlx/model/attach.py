"""`attach` puts wrappers on an mlx-lm model; `AttachedModel.detach` restores it exactly.

The model's own `model(ids, cache)` gives the same with wrappers on: outside `AttachedModel.forward` every wrapper
just calls the module it wraps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mtp_mlx.distributed import Peers
from mtp_mlx.errors import MTPError
from mtp_mlx.metal_kernels.dispatch import Dispatcher
from mtp_mlx.model import block_attention
from mtp_mlx.model.block import Block
from mtp_mlx.model.block_linear import BlockLinear, is_quantised
from mtp_mlx.model.cache import block_view
from mtp_mlx.model.gated_lora import GatedLinear
from mtp_mlx.model.head import HeadView, Vocabulary
from mtp_mlx.model.keeping_cache import SMALLEST
from mtp_mlx.model.positions import PositionedRoPE
from mtp_mlx.model.precision import precision_of
from mtp_mlx.model.rows import RowContext
from mtp_mlx.model.seams import (
    Seams,
    check_caches,
    check_slot_seams,
    embedding_shape,
    find_seams,
    is_recurrent,
    module_at,
    reads_places,
    replace_module,
    ropes_elsewhere,
)
from mtp_mlx.model.speculator import Speculator
from mtp_mlx.model.state_cache import RecordedMixer, TapedLinear, record, stop_recording
from mtp_mlx.model.tap import OutputTap, Tap, tapped_layers, tapped_module
from mtp_mlx.model.token_tables import TokensOnly, token_tables


class AttachedModel:
    """An mlx-lm model, with a speculator or without: forward passes over blocks, and the LM head.

    Not thread-safe: one forward pass at a time, and one generation at a time per model.

    Attributes:
        model: the mlx-lm model.
        speculator: the weights that draft, or None (then blocks have no slots).
        head_input: [B, R, D] hidden states of the newest pass at the point in the trunk that the speculator reads
            (`Speculator.first_hidden`); if it reads n more layers (`Speculator.tapped_layers`), [B, R, (n + 1) * D],
            theirs first.
        vocab_size: V, rows of the embedding table; larger ids are slots.
        hidden_size: D.
        precision: of the decoder layers' weights, in words: "bfloat16", "4-bit".
        info: the header of the speculator's folder (`mtp_mlx.adapter_folder`), or None.
        name: the model's name as the user gave it.
        recommended_sampling: the `SamplingConfig` that the model's makers recommend, or None for greedy decoding.
        experience: what earlier generations learnt (`mtp_mlx.planning.experience.Experience`), or None.
        text_source: what drafts from other texts beside the speculator (`mtp_mlx.decode.lookup.TextSource`), or None.
        peers: the processes that share this model, each with a part of it.
        kernels: kernels that may run in place of stock MLX, or None.
        exact: whether rows of decoding steps are computed as in plain decoding, bit for bit.
        branches: why drafts may have no branches (`mtp_mlx.model.branches`), "" if they may, None if not known yet.
    """

    def __init__(
        self,
        model: nn.Module,
        speculator: Speculator | None,
        seams: Seams,
        kernels: Dispatcher | None = None,
        exact: bool = False,
    ) -> None:
        self.model, self.speculator = model, speculator
        self.head_input: Any = None
        self.info: Any = None
        self.experience: Any = None
        self.branches: str | None = None
        self._places_rows = False
        self.text_source: Any = None
        self.peers = Peers()
        self.name = str(getattr(model, "model_type", "model"))
        self.recommended_sampling: Any = None
        self._seams = seams
        self.kernels = kernels if kernels is not None and kernels.active else None
        self.exact = exact
        self.precision = precision_of(seams.linears.values())
        self._rows = RowContext(kernels=self.kernels, exact=exact)
        self._hook: Callable[[], Any] | None = None
        self._embed = seams.embedding
        self._token_tables = token_tables(seams.trunk, seams.embedding_name)
        self._recurrent = is_recurrent(make_prompt_cache(model))
        self.vocab_size, self.hidden_size = embedding_shape(self._embed)
        self.head = HeadView(model, self._embed, kernels=self.kernels, exact=exact)
        self._draft_head: HeadView | None = None
        self._wrap()

    def _wrap(self) -> None:
        speculator = self.speculator
        slots = speculator if speculator is not None and speculator.places_slots else None
        first = "post-norm" if speculator is None else speculator.first_hidden
        listened = tapped_module(self._seams.trunk, first)
        below = tapped_layers(self._seams.trunk, () if speculator is None else speculator.tapped_layers)
        self._tap = None if listened is None else Tap(listened)
        self._layer_taps = [OutputTap(layer) for layer in below]
        if self.kernels is not None or self.exact:
            names = block_attention.install(self._seams.trunk)
            self._hook = weakref.finalize(self, block_attention.remove, names)  # at most once
            for path, linear in self._seams.linears.items():
                replace_module(self._seams.trunk, path, self._for_blocks(linear))
        if self.exact or slots is not None or self._places_rows:
            self.place_rows()
        if slots is not None:
            self._wrap_slots(slots)
        if self._recurrent:
            self._record_mixers()

    def place_rows(self) -> None:
        """Lets the rows of passes have any positions, from now on."""
        self._places_rows = True
        for path, rope in self._seams.ropes.items():
            replace_module(self._seams.trunk, path, PositionedRoPE(rope, self._rows))

    def _record_mixers(self) -> None:
        for path, mixer in self._seams.mixers.items():
            tape = record(mixer, self._rows)
            for inner in self._seams.linears:
                if inner.startswith(f"{path}."):
                    linear = module_at(self._seams.trunk, inner)
                    replace_module(self._seams.trunk, inner, TapedLinear(linear, tape))

    def _for_blocks(self, linear: nn.Module) -> nn.Module:
        """The layer, wrapped if some rows may be computed in another way than by the layer's own call."""
        if self.exact or (self.kernels is not None and is_quantised(linear)):
            return BlockLinear(linear, self._rows)
        return linear

    def _wrap_slots(self, speculator: Speculator) -> None:
        for path, low_rank in speculator.gated_layers().items():
            base = self._for_blocks(self._seams.linears[path])
            replace_module(self._seams.trunk, path, GatedLinear(base, low_rank, self._rows))
        layer = speculator.embedding_layer(self._embed, self.vocab_size, self._rows)
        self._seams.trunk[self._seams.embedding_name] = layer
        for name, table in self._token_tables.items():
            self._seams.trunk[name] = TokensOnly(table, self.vocab_size)

    def _unwrap(self) -> None:
        trunk = self._seams.trunk
        if self._tap is not None:
            self._tap.remove()
        if self._hook is not None:
            self._hook()
        for mixer in self._seams.mixers.values():
            stop_recording(mixer)
        for path, linear in self._seams.linears.items():
            replace_module(trunk, path, linear)
        for path, rope in self._seams.ropes.items():
            replace_module(trunk, path, rope)
        trunk[self._seams.embedding_name] = self._embed
        for name, table in self._token_tables.items():
            trunk[name] = table
        for tap in self._layer_taps:
            tap.remove()

    def detach(self) -> None:
        """Restores the model exactly; this object must not be used afterwards."""
        self._unwrap()
        self.speculator = self.kernels = None

    @contextmanager
    def unwrapped(self) -> Iterator[nn.Module]:
        """Temporarily gives the bare model, as if nothing were attached, to measure against it."""
        self._unwrap()
        try:
            yield self.model
        finally:
            self._wrap()

    @contextmanager
    def ungated(self) -> Iterator[None]:
        """Temporarily lets the adapter's LoRA act on real rows too, to train it as an ordinary LoRA."""
        self._rows.ungated = True
        try:
            yield
        finally:
            self._rows.ungated = False

    @property
    def why_linear(self) -> str:
        """Why slots can stand behind the last real row only; "" if they can stand behind any."""
        return "this model's recurrent state reads every row of a pass" if self._recurrent else ""

    @property
    def why_chains(self) -> str:
        """Why the rows of a pass must have positions one after another; "" if they need not."""
        if self._recurrent:
            return self.why_linear
        if not self._seams.ropes:
            return "this model has no seam 'rope' in its layers"
        places = reads_places(self._seams.trunk)
        return f"this model {places}" if places else ""

    def make_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """mlx-lm's own prompt cache for this model.

        Args:
            max_kv_size: most rows of a layer, of which the first 4 stay; it has no effect on models that make caches
                of their own (`makes_caches`).

        Raises:
            MTPError: if a layer's cache cannot be rolled back, or it has too few rows.
        """
        if max_kv_size is not None and max_kv_size < SMALLEST:
            raise MTPError(f"`max_kv_size` must be at least {SMALLEST}, not {max_kv_size}")
        caches = make_prompt_cache(self.model, max_kv_size)
        check_caches(caches, getattr(self.model, "model_type", type(self.model).__name__))
        return caches

    @property
    def makes_caches(self) -> bool:
        """Whether the model makes caches of its own, which no limit is given to, as in mlx-lm."""
        return hasattr(self.model, "make_cache")

    def forward(self, block: Block, cache: list[Any]) -> mx.array:
        """Hidden states after the final norm, [B, R, D]. Appends R rows to every layer's cache."""
        with self._rows.running(block):
            view = [block_view(layer_cache, self._rows) for layer_cache in cache]
            hidden = self._seams.trunk(block.ids, cache=view)
        self.head_input = self._heard(hidden)
        return hidden

    def states_of(self, ids: mx.array) -> mx.array:
        """What the speculator reads (`head_input`) of texts [B, T] from their start, without a cache."""
        return self._heard(self._seams.trunk(ids, cache=None))

    def states_to_train_on(self, ids: mx.array) -> mx.array:
        """`states_of` with the trunk's last state, after its final norm, as the last D columns: it teaches.

        The speculator may read that one itself; then it is there once.
        """
        hidden = self._seams.trunk(ids, cache=None)
        heard = self._heard(hidden)
        return heard if self._tap is None else mx.concatenate([heard, hidden], axis=-1)

    @property
    def trained_on_size(self) -> int:
        """Size of the last axis of `states_to_train_on`."""
        return self.head_input_size + (0 if self._tap is None else self.hidden_size)

    def _heard(self, hidden: mx.array) -> mx.array:
        """`head_input` of the pass that gave `hidden`."""
        first = hidden if self._tap is None else self._tap.take()
        below = [tap.take() for tap in self._layer_taps]
        return mx.concatenate([*below, first], axis=-1) if below else first

    @property
    def head_input_size(self) -> int:
        """Size of the last axis of `head_input`."""
        return (1 + len(self._layer_taps)) * self.hidden_size

    def embed(self, ids: mx.array) -> mx.array:
        """The base model's own embedding, [...] -> [..., D]; takes no slot ids."""
        # A quantised embedding cannot look up a scalar.
        return self._embed(ids) if ids.ndim else self._embed(ids[None])[0]

    def last_norm(self, hidden: mx.array) -> mx.array:
        """The trunk's final norm, [..., D] -> [..., D], for heads that end with it.

        Raises:
            MTPError: if it is not found in this model.
        """
        norm = tapped_module(self._seams.trunk, "pre-norm")
        assert norm is not None
        return norm(hidden)

    @property
    def draft_ids(self) -> mx.array | None:
        """[N] int32 ids that may be drafted, or None for the whole vocabulary."""
        return None if self.speculator is None else self.speculator.draft_ids

    @property
    def most_drafts(self) -> int:
        """Default number of drafts per step; 0 without a speculator."""
        return 0 if self.speculator is None else self.speculator.drafts

    @property
    def lead(self) -> int:
        """Rows at the start of every slot group that draft nothing."""
        return 0 if self.speculator is None else self.speculator.lead

    @property
    def draft_head(self) -> HeadView:
        """The LM head for drafts, restricted to the draft vocabulary if there is one."""
        if self._draft_head is None:
            self._draft_head = self._head_over(self.draft_ids)
        return self._draft_head

    @property
    def draft_vocabulary(self) -> Vocabulary:
        """The vocabulary from which drafts are picked that will be verified."""
        return Vocabulary(self.draft_head, self.draft_ids)

    @property
    def whole_vocabulary(self) -> Vocabulary:
        """The full vocabulary, for unverified emission."""
        return self.draft_vocabulary if self.draft_ids is None else Vocabulary(self._head_over(None), None)

    def _head_over(self, ids: mx.array | None) -> HeadView:
        """The LM head over `ids` (all if None), for drafts, whose rows need not be exact."""
        if ids is None and not self.exact:
            return self.head
        return HeadView(self.model, self._embed, ids, self.kernels)


def attach(
    model: nn.Module,
    speculator: Speculator | None = None,
    kernels: Dispatcher | None = None,
    exact: bool = False,
) -> AttachedModel:
    """Puts the wrappers that `speculator` needs on `model` (in place; `AttachedModel.detach` undoes it).

    Args:
        model: the mlx-lm model.
        speculator: the weights that draft, or None.
        kernels: kernels that may run in place of stock MLX; they have no gradients, so training attaches without
            them.
        exact: see `AttachedModel`.

    Raises:
        MTPError: if the model lacks a seam, is already attached, or does not support `exact`.
    """
    seams = find_seams(model)
    wrapped = (PositionedRoPE, BlockLinear, RecordedMixer)
    if any(isinstance(module, wrapped) for _, module in seams.trunk.named_modules()):
        raise MTPError("this model is already attached; detach it first")
    if speculator is not None and speculator.places_slots:
        check_slot_seams(seams, model)
        missing = sorted(speculator.gated_layers().keys() - seams.linears.keys())
        if missing:
            raise MTPError(f"the adapter has weights for layers this model lacks: {missing[:5]}")
    if exact:
        _check_exact(seams)
    attached = AttachedModel(model, speculator, seams, kernels, exact)
    _check_head(attached)
    if exact:
        _check_own_keys(attached)
    return attached


def _check_head(attached: AttachedModel) -> None:
    """Raises MTPError if the model's head cannot run without its trunk."""
    try:
        attached.head(mx.zeros((1, 1, attached.hidden_size)))  # lazily: nothing is computed
    except (AttributeError, TypeError, ValueError) as error:
        attached.detach()
        raise MTPError(
            f"models of type '{attached.name}' cannot be used here: mlx-lm computes their logits in a way that needs "
            "the layers (no seam 'head'); use mlx-lm itself for them"
        ) from error


def _check_exact(seams: Seams) -> None:
    """Raises MTPError for layers whose rows cannot be computed one by one from outside the layer."""
    hookable = block_attention.hookable(seams.trunk)
    modules = dict(seams.trunk.named_modules())
    reasons = {
        "mixture-of-experts layers": [p for p, m in modules.items() if "SwitchLinear" in type(m).__name__],
        "latent attention": [p for p, m in modules.items() if type(m).__name__ == "MultiLinear"],
        "layers that the trunk takes apart": [
            f"layers.{index}" for index, layer in enumerate(seams.trunk.layers) if not callable(layer)
        ],
        "layers outside the trunk's list of layers": ropes_elsewhere(seams),
        "attention that this model computes by itself": [
            path.rsplit(".", 1)[0]
            for path in seams.ropes
            if type(modules[path.rsplit(".", 1)[0]]).__module__ not in hookable
        ],
    }
    for what, paths in reasons.items():
        if paths:
            raise MTPError(
                f"exact decoding does not support {what} ({paths[0]}): leave `exact` out for this model"
            )


def _check_own_keys(attached: AttachedModel) -> None:
    """Raises MTPError if a layer reads keys of another one, which are not known to be those of a window or a tree."""
    one = Block.real(mx.zeros((1, 1), dtype=mx.int32))
    cache = make_prompt_cache(attached.model)
    if block_attention.foreign_calls(lambda: attached.forward(one, cache)):  # nothing is computed
        attached.detach()
        raise MTPError(
            "exact decoding does not support layers that read the keys of another layer: leave `exact` out for this "
            "model"
        )
