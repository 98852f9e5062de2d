"""Takes heads over that somebody else made: converts them once, and finds out by measuring how they are run.

What a form does not say (norms around zero or not, which state the first draft takes, and the next one) shows in how
many drafts are right: `verify` measures that on the model's own text, and the convention that fits is the one that is
kept. Heads that draft badly under every convention are refused: they are of another model, or damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mtp_mlx.adapter_folder import read_header, write_header
from mtp_mlx.convert.adapters.gemma4_assistant import fill_assistant
from mtp_mlx.convert.heads.copies import without_copies
from mtp_mlx.convert.heads.families import Found
from mtp_mlx.convert.heads.plan import Overrides, find_heads, plan_heads
from mtp_mlx.convert.heads.variant import Variant
from mtp_mlx.convert.heads.verify import Verification, measure_folder, own_texts
from mtp_mlx.convert.heads.write import Base, fill_folder
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.drafters.gemma4_assistant.config import POSITIONS, is_assistant
from mtp_mlx.drafters.gemma4_assistant.folder import load as load_assistant
from mtp_mlx.drafters.gemma4_assistant.measure import settle_position
from mtp_mlx.errors import ConversionError

ALWAYS = 2.0  # the other conventions are tried whatever the acceptance, which may be good under a wrong one
LEAST = 0.2  # of first drafts that must be right
TOKENS = 48  # of each text that drafts are measured on


@dataclass(frozen=True)
class Target:
    """The model that heads are taken over for.

    Attributes:
        name: what it is called.
        config: its config.json, for heads that come without one.
        model: as mlx-lm loads it.
        tokenizer: its tokenizer.
        prompts: token ids of the prompts to which it answers for the measurement.
    """

    name: str
    config: dict[str, Any]
    model: nn.Module
    tokenizer: Any
    prompts: Sequence[Sequence[int]]


def take_heads(checkpoint: Checkpoint, folder: Path, target: Target, tell: Callable[[str], None]) -> None:
    """Fills the existing empty folder `folder` with the heads of `checkpoint`, as an adapter of `target`.

    The checkpoint may be a Gemma 4 assistant instead.

    Args:
        tell: told what was measured and decided.

    Raises MTPError: no heads of a known kind, heads of another model, or heads that draft right in fewer than a fifth
        of cases under every convention.
    """
    if is_assistant(checkpoint.config):
        _take_assistant(checkpoint, folder, target, tell)
        return
    if not checkpoint.config:  # a file alone: its model says what it is
        checkpoint = replace(checkpoint, config=target.config, config_name="config.json")
    found = find_heads(checkpoint)
    if found is not None:
        checkpoint, found = without_copies(checkpoint, found, target.model)
    if found is not None and found.convention.kind == "lora":
        raise ConversionError(f"{checkpoint.path}: this is a LoRA adapter, and has no MTP heads")
    base = Base.of(target.name, target.model)
    plan = plan_heads(checkpoint, found, Overrides())
    _fill(checkpoint, found, folder, base, Overrides())
    if plan.convention.kind != "cascade":
        tell(f"heads of the kind {plan.title} run in one way only, so nothing was measured")
        return
    tell(f"measuring how the heads of {checkpoint.path.name} are run, once")
    result = _settled(checkpoint, found, folder, base, target, tell)
    if result.acceptance[0] < LEAST:
        tried = {result.written: result.acceptance[0], **result.others}
        shown = "; ".join(f"{value:.2f} with {variant}" for variant, value in tried.items())
        raise ConversionError(
            f"{checkpoint.path}: these heads are not for this model, or damaged: the first draft is right in "
            f"{result.acceptance[0]:.0%} of {result.tokens} cases, at least {LEAST:.0%} are wanted. Tried: {shown}"
        )


def _take_assistant(
    checkpoint: Checkpoint, folder: Path, target: Target, tell: Callable[[str], None]
) -> None:
    """As `take_heads`, for a Gemma 4 assistant: what its form leaves open is the position that it looks back from."""
    fill_assistant(folder, checkpoint, Base.of(target.name, target.model), target.model)
    tell(f"measuring the assistant {checkpoint.path.name}, once")
    source, header = load_assistant(folder, read_header(folder), target.model)
    tried = settle_position(target.model, source, target.prompts, target.tokenizer.eos_token_ids, TOKENS)
    found = tried[source.config.position]
    shown = "; ".join(
        f"{' / '.join(f'{value:.2f}' for value in one.acceptance)} from {POSITIONS[position]}"
        for position, one in tried.items()
    )
    if not found.drafts:
        raise ConversionError(
            f"{checkpoint.path}: the model ends its answer to every prompt at once, so there is no text to measure "
            "the assistant on"
        )
    if found.acceptance[0] < LEAST:
        raise ConversionError(
            f"{checkpoint.path}: this assistant is not for this model, or damaged: the first draft is right in "
            f"{found.acceptance[0]:.0%} of {found.drafts} cases, at least {LEAST:.0%} are wanted. Tried, by depth: "
            f"{shown}"
        )
    tell(f"drafts of this assistant are right in so many cases, by depth: {shown}")
    write_header(
        folder,
        replace(
            header,
            own={"assistant": source.config.to_json()},
            acceptance=found.acceptance,
            acceptance_by_precision={found.precision: found.acceptance},
            measurements={"positions": {position: one.acceptance for position, one in tried.items()}},
        ),
    )


def _settled(
    checkpoint: Checkpoint,
    found: Found | None,
    folder: Path,
    base: Base,
    target: Target,
    tell: Callable[[str], None],
) -> Verification:
    """Measures the heads in `folder`, and writes them anew for as long as another convention fits better."""
    overrides = Overrides()
    texts = own_texts(target.model, target.tokenizer, target.prompts, TOKENS)
    result = measure_folder(target.model, folder, texts, ALWAYS)
    better = result.fits_better
    if better is not None:
        tell(f"the heads were trained for {better}, and not for {result.written}: they are run so")
        overrides = _overrides(better)
        _fill(checkpoint, found, folder, base, overrides)
        result = measure_folder(target.model, folder, texts, ALWAYS)
    recycled = result.recycles_better
    if recycled is not None:
        tell(f"the second draft was trained on the {recycled} state: it is run so")
        _fill(checkpoint, found, folder, base, replace(overrides, head_recycled=recycled))
        result = measure_folder(target.model, folder, texts, ALWAYS)
    depths = " / ".join(f"{value:.2f}" for value in result.acceptance)
    tell(f"drafts of these heads are right in {depths} of {result.tokens} cases, by depth ({result.written})")
    return result


def _overrides(variant: Variant) -> Overrides:
    return Overrides(variant.norms, variant.stored_order, variant.first_hidden)


def _fill(
    checkpoint: Checkpoint, found: Found | None, folder: Path, base: Base, overrides: Overrides
) -> None:
    for file in folder.iterdir():
        file.unlink()
    fill_folder(folder, checkpoint, plan_heads(checkpoint, found, overrides), base)
