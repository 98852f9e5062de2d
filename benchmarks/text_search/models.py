"""The tiny random models of the search, bare and attached, kept from one case to the next."""

from __future__ import annotations

import dataclasses
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mtp_mlx.decode.cache_check import check_quantisation
from mtp_mlx.drafters.draft_model.source import DraftModel
from mtp_mlx.drafters.heads.cascade import new_heads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.medusa import MedusaHead, MedusaHeads
from mtp_mlx.drafters.heads.mtp_head import block_like, last_layers
from mtp_mlx.drafters.heads.parallel import ParallelHead, ParallelHeads
from mtp_mlx.drafters.masks.weights import MaskAdapterConfig, new_adapter
from mtp_mlx.drafters.ptp.config import PTPConfig
from mtp_mlx.drafters.ptp.weights import new_ptp_adapter
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.seams import embedding_shape, find_seams
from mtp_mlx.serve.batch import why_not_batch
from tests import tiny
from text_search.case import Case

WEIGHT_SEED, DRAFT_SEED = 3, 7  # 3 is good for all architectures: greedy text varies
MOST_DRAFTS = 4
GROUP = 32
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "moe_intermediate_size": 64}
KEPT = 400  # models; one is less than 2 MB

WINDOWED = (*tiny.WINDOWED, *tiny.MULTIMODAL)
# recurrent_gemma computes its logits where the layers are needed; lfm2's other sizes do not follow the hidden size.
RECURRENT = tuple(name for name in tiny.RECURRENT if name != "recurrent_gemma")
ARCHITECTURES = (*tiny.ARCHITECTURES, *WINDOWED, *RECURRENT)
NARROW_ONLY = ("lfm2",)
EXPERTS = (*tiny.MOE_ARCHITECTURES, "gpt_oss")  # MLX's CPU code multiplies by experts in float32 only
STATES_ONLY = ("rwkv7",)
COPIES_LAYERS = ("mtp-heads", "looped-heads", "parallel-heads")  # of the model, as their blocks


@lru_cache(maxsize=KEPT)
def bare(architecture: str, dtype: str, bits: int, wide: bool) -> Any:
    """A model that is never attached to: what mlx-lm itself runs."""
    return _new(architecture, dtype, bits, wide)


def bare_of(case: Case) -> Any:
    """The model of a case, as mlx-lm runs it."""
    return bare(case.architecture, case.dtype, case.bits, case.wide)


def attached(case: Case, drafter: str | None = None) -> AttachedModel:
    """The model of a case with its drafter, or another one."""
    return _attached(case.architecture, case.dtype, case.bits, case.wide, drafter or case.drafter, case.exact)


@lru_cache(maxsize=KEPT)
def _attached(
    architecture: str, dtype: str, bits: int, wide: bool, drafter: str, exact: bool
) -> AttachedModel:
    model = _new(architecture, dtype, bits, wide)
    return attach(model, _source(model, drafter, dtype), exact=exact)


def _new(architecture: str, dtype: str, bits: int, wide: bool) -> Any:
    known = {one.name for one in dataclasses.fields(tiny._module(architecture).ModelArgs)}
    sizes = {name: size for name, size in WIDE.items() if name in known} if wide else {}
    model = tiny.tiny_model(architecture, seed=WEIGHT_SEED, **sizes)
    keeps = getattr(model, "cast_predicate", lambda path: True)  # as `mlx_lm.convert`

    def cast(path: str, value: mx.array) -> mx.array:
        return value.astype(getattr(mx, dtype)) if keeps(path) else value

    model.update(tree_map_with_path(cast, model.parameters()))
    if bits:
        nn.quantize(model, GROUP, bits, class_predicate=lambda _, layer: _fits(layer))
    mx.eval(model.parameters())
    return model


def _fits(layer: nn.Module) -> bool:
    return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % GROUP == 0


def _source(model: Any, drafter: str, dtype: str) -> Any:
    """A drafter none of whose weights is zero, so that a row that should not see another one shows."""
    if drafter == "none":
        return None
    if drafter == "draft-model":
        return DraftModel(tiny.tiny_model("llama", seed=DRAFT_SEED), tiny.VOCABULARY, MOST_DRAFTS)
    mx.random.seed(DRAFT_SEED)
    source = _untrained(model, drafter)
    rng = np.random.default_rng(DRAFT_SEED)

    def shaken(value: mx.array) -> mx.array:
        noise = mx.array(0.2 * rng.normal(size=value.shape).astype(np.float32))
        return value + noise if mx.issubdtype(value.dtype, mx.floating) else value

    source.apply(shaken)
    source.set_dtype(getattr(mx, dtype))  # as `load`
    mx.eval(source.parameters())
    return source


def _untrained(model: Any, drafter: str) -> Any:
    trunk = find_seams(model)
    size = embedding_shape(trunk.embedding)[1]
    if drafter == "mask-tokens":
        return new_adapter(model, MaskAdapterConfig(slots=MOST_DRAFTS, rank=3, alpha=6.0, sampler_width=24))
    if drafter == "one-mask":
        shape = MaskAdapterConfig(slots=MOST_DRAFTS, rank=3, alpha=6.0, sampler_width=0, shared_mask=True)
        return new_adapter(model, shape)
    if drafter in ("ptp-o", "ptp-c"):
        variant: Any = drafter[-1]
        return new_ptp_adapter(model, PTPConfig(slots=MOST_DRAFTS, rank=3, alpha=6.0, variant=variant))
    if drafter == "medusa-heads":
        says = HeadConvention("test", "medusa", "", lm_head="own", output_norm="identity")
        return MedusaHeads([MedusaHead(1, size, tiny.VOCABULARY) for _ in range(MOST_DRAFTS)], says)
    if drafter == "parallel-heads":
        says = HeadConvention("test", "parallel", "", "before-last-layer", "none", output_norm="trunk")
        layer = last_layers(trunk.trunk, 1)[0]
        heads = [ParallelHead(block_like(trunk.trunk, layer), size) for _ in range(MOST_DRAFTS)]
        return ParallelHeads(heads, says)
    looped = drafter == "looped-heads"
    convention = HeadConvention("test", recycled_hidden="raw" if looped else "normed")
    return new_heads(model, 2 if looped else MOST_DRAFTS, convention, drafts=MOST_DRAFTS)


@cache
def why_not(architecture: str, drafter: str, exact: bool) -> str:
    """The sentence with which the package refuses this combination, or ""."""
    try:
        _attached(architecture, "float32", 0, False, drafter, exact)
    except MTPError as error:
        return str(error)
    return ""


@cache
def can_quantise_cache(architecture: str) -> bool:
    """Whether the heads of the wide model can be quantised in groups of `GROUP`, and its caches at all."""
    model = _attached(architecture, "float32", 0, True, "none", False)
    try:
        check_quantisation(model, model.make_cache(), 8, GROUP)
    except MTPError:
        return False
    return True


@cache
def can_share(architecture: str, dtype: str, bits: int, wide: bool) -> bool:
    """Whether texts of this model can share passes."""
    return not why_not_batch(_attached(architecture, dtype, bits, wide, "none", False))


def new_cache(case: Case, model: AttachedModel) -> list[Any]:
    """An empty prompt cache, as a user would make it."""
    made = model.make_cache()
    if not case.window:
        return made
    return [RotatingKVCache(max_size=case.window) if type(one) is KVCache else one for one in made]
