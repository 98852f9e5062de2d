"""Heads that training starts from: those of a folder, of any kind and convention that the runtime runs.

They are trained as they are run: on the state of the trunk that their convention names, with their own embedding and
LM head where they have them, which are kept as the base's are. They are written back in the convention, and in the
types, of the folder that they come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mtp_mlx.adapter_folder import read_header
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.config import HeadsConfig, config_of
from mtp_mlx.drafters.heads.dense import dequantise
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.drafters.heads.folder import load
from mtp_mlx.drafters.heads.mtp_head import norm_eps
from mtp_mlx.drafters.heads.options import HeadsSettings
from mtp_mlx.drafters.heads.shape import check_start, drafts_to_train
from mtp_mlx.drafters.heads.start import extend_heads, extended_count
from mtp_mlx.drafters.heads.stored import BITS, GROUP_SIZE, is_quantised
from mtp_mlx.drafters.heads.taps import TapFusion, layer_numbers
from mtp_mlx.drafters.registry import check_draft_ids
from mtp_mlx.errors import MTPError
from mtp_mlx.model.seams import find_seams
from mtp_mlx.train.method import Tell


@dataclass(frozen=True)
class Start:
    """Heads to train, and what the folder that they come from says of them.

    Attributes:
        heads: dense; of heads that are not trained every weight is frozen.
        config: what their new folder will say.
        source: where they came from before, as in the header.
        store: how their weights were stored: "8bit" or "bf16" (not quantised, in the types of `dtypes`).
        dtypes: of their weights, by name.
        frozen: number of heads that are not trained.
    """

    heads: DraftHeads
    config: HeadsConfig
    source: dict[str, Any]
    store: str
    dtypes: dict[str, mx.Dtype]
    frozen: int = 0


def read_start(folder: Path, model: nn.Module, settings: HeadsSettings, tell: Tell) -> Start:
    """The heads in `folder`, extended if the settings say so.

    Args:
        model: the bare base model.
        tell: shows the user a line.

    Raises:
        MTPError: no heads there, heads of another base model, or of another shape than the settings say.
    """
    heads, header = load(folder, read_header(folder), model)
    check_draft_ids(folder, heads.draft_ids, model)
    config, store = config_of(folder, header), "8bit" if is_quantised(heads) else "bf16"
    if store == "8bit" and settings.store is None:
        _check_quantisation(folder, config)
    dequantise(heads)
    heads.train()  # some layers of mlx-lm have kernels without gradients, which they use otherwise
    heads.freeze_vocabulary()
    drafts, wanted = config.drafts, drafts_to_train(config, settings)
    if isinstance(heads, MTPHeads):
        if check_start(folder, config, settings, wanted, len(find_seams(model).trunk.layers)):
            drafts = wanted
            config = _first_head(folder, heads, config, tell)
        config = _more_taps(folder, heads, config, model, settings, tell)
    else:
        _check_independent(folder, config, settings)
    drafts = max(drafts, config.count)  # heads that the folder does not use are trained as well
    if settings.heads is None and settings.extend is None and drafts == config.drafts:
        tell(f"trained: {drafts} draft{'s' * (drafts > 1)} a step, as in {folder}")
    if settings.extend is None and drafts != config.drafts:
        tell(f"the heads of {folder} made {config.drafts} draft(s) a step; they are trained for {drafts}")
    heads.set_heads(heads.heads, drafts)
    parameters = cast("list[tuple[str, mx.array]]", tree_flatten(heads.parameters()))
    dtypes = {name: value.dtype for name, value in parameters}
    start = Start(heads, replace(config, drafts=drafts, quantization={}), dict(header.source), store, dtypes)
    if settings.extend is not None:
        start = _extended(folder, start, settings.extend, tell)
    too_short = settings.too_short_for(start.config.drafts)
    if too_short is not None:
        raise MTPError(f"{too_short}: set `max_length` to {start.config.drafts + 2} or more")
    return start


def _first_head(folder: Path, heads: MTPHeads, config: HeadsConfig, tell: Tell) -> HeadsConfig:
    """Leaves the first of several heads, which is to make all drafts."""
    if config.count > 1:
        tell(f"of the {config.count} heads of {folder} the first one is trained, to make all drafts")
        heads.set_heads(heads.heads[:1], 1)
    return replace(config, count=1, blocks=config.blocks[:1])


def _more_taps(
    folder: Path, heads: MTPHeads, config: HeadsConfig, model: nn.Module, settings: HeadsSettings, tell: Tell
) -> HeadsConfig:
    """Lets heads read the states that the settings add; they draft as before until they are trained."""
    trunk = find_seams(model).trunk
    wanted = config.taps if settings.taps is None else list(layer_numbers(settings.taps, len(trunk.layers)))
    if wanted == config.taps:
        return config
    fusion = TapFusion(wanted, heads.heads[0].fuse.weight.shape[0], norm_eps(trunk))
    if "fusion" in heads:
        fusion.keep(heads.fusion)
    heads.fusion = fusion
    tell(
        f"the heads of {folder} read the state(s) after layer(s) {', '.join(map(str, wanted))} as well from now on"
    )
    return replace(config, taps=wanted)


def _check_quantisation(folder: Path, config: HeadsConfig) -> None:
    """Refuses to store heads in another quantisation than theirs, unless the settings say so."""
    own = config.quantization
    if own != {"group_size": GROUP_SIZE, "bits": BITS}:
        raise MTPError(
            f"`start_from` {folder} has heads in {own['bits']} bits, in groups of {own['group_size']}, which are not "
            f"written: set `store` to 8bit ({BITS} bits, in groups of {GROUP_SIZE}), bf16 or auto"
        )


def _check_independent(folder: Path, config: HeadsConfig, settings: HeadsSettings) -> None:
    """Refuses settings that only a cascade of decoder layers has."""
    where = f"`start_from` {folder} has heads of the kind '{config.convention.kind}'"
    for name in ("extend", "shared", "layers", "taps"):
        if getattr(settings, name) is not None:
            raise MTPError(f"{where}, for which `{name}` has no meaning: leave it out")
    if settings.block_rate != 1:
        raise MTPError(f"{where}, which have no copied layers: leave `block_rate` out")
    if settings.heads not in (None, config.count):
        raise MTPError(
            f"{where} and {config.count} of them, and `heads` is {settings.heads}: leave `heads` out"
        )


def _extended(folder: Path, start: Start, extend: str, tell: Tell) -> Start:
    """Looped extension: the heads, now frozen, and copies of them, which are trained."""
    heads, config, trained = start.heads, start.config, len(start.heads.heads)
    assert isinstance(heads, MTPHeads)
    count = extended_count(extend, trained)
    heads.freeze_fusion()
    heads.set_heads(extend_heads(heads.heads, count), count)
    blocks = [config.blocks[index % trained] for index in range(count)]
    dtypes = dict(start.dtypes)
    for name, dtype in start.dtypes.items():
        kind, _, rest = name.partition(".")
        index, _, inner = rest.partition(".")
        if kind == "heads" and int(index) + trained < count:
            dtypes[f"heads.{int(index) + trained}.{inner}"] = dtype
    tell(f"{trained} heads of {folder} are frozen; {count - trained} copies are trained")
    config = replace(config, blocks=blocks, count=count, drafts=count)
    return replace(start, config=config, dtypes=dtypes, frozen=trained)
