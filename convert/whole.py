"""Converts a whole checkpoint to an mlx-lm model folder, with its MTP heads in the adapter folder `OUT/mtp`.

mlx-lm's own functions load, cast, quantise and save the trunk, as in `mlx_lm.convert`; the heads are written as
`heads_only` writes them. OUT appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import load_tokenizer, quantize_model, save

from mtp_mlx.adapter_folder import CARD_NAME, CONFIG_NAME, SIDECAR, WEIGHTS_NAME, sidecar
from mtp_mlx.convert.adapters.single_mask import MaskToken, find_mask, mask_sidecar
from mtp_mlx.convert.heads.families import Found
from mtp_mlx.convert.heads.plan import AS_FAMILY, Overrides, plan_heads
from mtp_mlx.convert.heads.quantise import quantise_folder
from mtp_mlx.convert.heads.targets import HeadPlan
from mtp_mlx.convert.heads.write import Base, fill_folder
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.convert.trunk import Trunk, open_trunk
from mtp_mlx.errors import ConversionError
from mtp_mlx.files import check_out, new_folder
from mtp_mlx.model_faults import tokenizer_fault

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class WholeSettings:
    """How a whole checkpoint is converted.

    Attributes:
        dtype: of weights that are not quantised: a key of DTYPES; None for that of config.json, or as stored.
        quantize: bits of the trunk's weights, None for none.
        group_size: weights of the trunk that share a scale, as in mlx-lm.
        quantize_heads: bits of the heads' weights, None for none.
        overrides: how the heads are stored and run, as for `plan_heads`.
        heads: convert the heads too.
        force: replace OUT if it is a model folder.
    """

    dtype: str | None = None
    quantize: int | None = None
    group_size: int = 64
    quantize_heads: int | None = None
    overrides: Overrides = AS_FAMILY
    heads: bool = True
    force: bool = False


DEFAULT = WholeSettings()


@dataclass
class Converted:
    """A converted checkpoint.

    Attributes:
        folder: the model folder.
        heads: the heads' plan, or None if there are none.
        notes: what was decided about the heads, and why.
        left_out: names of stored tensors of the trunk that mlx-lm's model does not use.
        mask: the mask token beside the trunk, or None if there is none.
    """

    folder: Path
    heads: HeadPlan | None = None
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    mask: MaskToken | None = None


def convert_whole(
    checkpoint: Checkpoint,
    found: Found | None,
    out: str | Path,
    settings: WholeSettings = DEFAULT,
    progress: Callable[[str], None] | None = None,
) -> Converted:
    """Convert `checkpoint` into the model folder `out`.

    Args:
        found: its heads, as `heads_beside_trunk` found them.
        progress: called with each stage in a few words.

    Raises MTPError: `out` exists; a checkpoint without a trunk, tokenizer or configuration, or with tensors that do
    not fit (one message lists them all); a full disk.
    """
    tell, out = progress or (lambda _: None), Path(out)
    check_out(out, force=settings.force, mark="config.json", kind="a model folder", source=checkpoint.path)
    _check_trunk(checkpoint, found)
    plan, problem = _plan(checkpoint, found if settings.heads else None, settings.overrides)
    mask = find_mask(checkpoint.folder) if settings.heads else None
    with contextlib.ExitStack() as stack:
        try:
            tell("loading the trunk")
            trunk = stack.enter_context(open_trunk(checkpoint, found, out))
        except ConversionError as error:
            if not problem:
                raise
            raise ConversionError(f"{problem}; and {error}") from error
        if problem:
            raise ConversionError(problem)
        tokenizer = _tokenizer(checkpoint, trunk)
        _cast(trunk, settings.dtype)
        if settings.quantize:
            tell(f"quantising to {settings.quantize} bits")
            _quantise(checkpoint, trunk, settings)
        base = Base.of(out.name, trunk.model)
        notes = [] if plan is None else [*plan.notes, *base.notes]
        result = Converted(out, plan, notes, trunk.left_out)
        beside = None if mask is None else mask_sidecar(mask, trunk.model, out.name)
        with new_folder(out) as folder:
            tell("writing the trunk")
            save(folder, checkpoint.folder, trunk.model, tokenizer, trunk.config)
            _write_heads(checkpoint, plan, folder / SIDECAR, base, settings, tell)
            if beside is not None and not (folder / SIDECAR).exists():
                beside.put_into(folder)
                result.mask = mask
    return result


@contextlib.contextmanager
def open_base(checkpoint: Checkpoint, found: Found | None) -> Iterator[tuple[nn.Module, Any]]:
    """The bare trunk of `checkpoint` and its tokenizer, usable inside the block.

    Args:
        found: the heads of the checkpoint, as for `open_trunk`.

    Raises ConversionError: as `open_trunk`, or no tokenizer.
    """
    with open_trunk(checkpoint, found) as trunk:
        yield trunk.model, _tokenizer(checkpoint, trunk)


def _plan(checkpoint: Checkpoint, found: Found | None, overrides: Overrides) -> tuple[HeadPlan | None, str]:
    """The heads' plan, if there are any; and what is wrong with them, to be reported together with the trunk."""
    if found is None:
        return None, ""
    try:
        return plan_heads(checkpoint, found, overrides), ""
    except ConversionError as error:
        return None, str(error)


def _check_trunk(checkpoint: Checkpoint, found: Found | None) -> None:
    if found is None or checkpoint.tensors.keys() - found.owned:
        return
    what = "a LoRA adapter" if found.convention.kind == "lora" else "MTP heads"
    raise ConversionError(
        f"{checkpoint.path}: contains {what} but no trunk; convert it with `heads_only`, and its base model "
        "separately"
    )


def _tokenizer(checkpoint: Checkpoint, trunk: Trunk) -> Any:
    try:
        # If this is not given, transformers asks on the terminal whether to run the folder's code.
        extra = {"trust_remote_code": False}
        tokenizer = load_tokenizer(checkpoint.folder, extra, eos_token_ids=trunk.config.get("eos_token_id"))
    except Exception as error:  # transformers' own errors have no common class
        reason = " ".join(str(error).split())[:200]
        raise ConversionError(
            f"{checkpoint.folder}: the tokenizer cannot be loaded ({type(error).__name__}: {reason}); put the "
            "model's own tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    if len(tokenizer) < 2:  # what transformers makes of a folder without one
        raise ConversionError(f"{checkpoint.folder}: {tokenizer_fault(checkpoint.folder, None)}")
    return tokenizer


def _cast(trunk: Trunk, dtype: str | None) -> None:
    """Casts the trunk as `mlx_lm.convert` does."""
    text = trunk.config.get("text_config") or {}
    name = dtype or trunk.config.get("torch_dtype") or trunk.config.get("dtype") or text.get("dtype")
    if name not in DTYPES:
        return
    keep: Callable[[str], bool] = getattr(trunk.model, "cast_predicate", lambda _: True)

    def cast(path: str, value: mx.array) -> mx.array:
        return value.astype(DTYPES[name]) if keep(path) and mx.issubdtype(value.dtype, mx.floating) else value

    trunk.model.update(tree_map_with_path(cast, trunk.model.parameters()))
    for config in (trunk.config, text):
        for key in ("torch_dtype", "dtype"):
            if key in config:
                config[key] = name


def _quantise(checkpoint: Checkpoint, trunk: Trunk, settings: WholeSettings) -> None:
    if any(isinstance(module, nn.QuantizedLinear) for _, module in trunk.model.named_modules()):
        raise ConversionError(
            f"{checkpoint.path}: the weights are quantised already; leave `quantize` out, or use the original"
        )
    with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints its bits per weight
        trunk.model, trunk.config = quantize_model(
            trunk.model, trunk.config, settings.group_size, settings.quantize
        )


def _write_heads(
    checkpoint: Checkpoint,
    plan: HeadPlan | None,
    folder: Path,
    base: Base,
    settings: WholeSettings,
    tell: Callable[[str], None],
) -> None:
    """Writes the planned heads into `folder`, or copies those that an earlier conversion put beside the trunk."""
    before = sidecar(checkpoint.path) if settings.heads else None
    if before is None and plan is None:
        return
    folder.mkdir()
    if before is not None:
        for name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME):
            if (before / name).is_file():
                shutil.copy(before / name, folder)
    elif plan is not None:
        tell("writing the heads")
        dtype = _STORED[settings.dtype] if settings.dtype else None
        fill_folder(folder, checkpoint, plan, base, dtype=dtype)
        if settings.quantize_heads:
            quantise_folder(folder, settings.quantize_heads)


def report_lines(result: Converted) -> list[str]:
    """What to tell the user about a finished conversion."""
    lines = []
    if result.heads is not None:
        lines.append(f"heads: {result.heads.count} of {result.heads.title}, in {result.folder / SIDECAR}")
        lines += [f"heads: {note}" for note in result.notes]
        lines += [
            f"heads: left out {name}, equal to {trunk} byte for byte" for name, trunk in result.heads.dropped
        ]
    if result.mask is not None:
        lines.append(f"mask token: id {result.mask.token_id}, in {result.folder / SIDECAR}")
    if result.left_out:
        shown = ", ".join(result.left_out[:8])
        more = f" and {len(result.left_out) - 8} more" if len(result.left_out) > 8 else ""
        lines.append(f"mlx-lm's model does not use {len(result.left_out)} tensor(s), left out: {shown}{more}")
    return lines
