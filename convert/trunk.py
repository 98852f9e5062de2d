"""The trunk of a checkpoint, loaded by mlx-lm's own code: its `load_model`, its model class, its `sanitize`.

mlx-lm reads folders of safetensors, so such a folder is made first: with links if the checkpoint is safetensors,
with a copy of the tensors otherwise (PyTorch files, Meta's names). Before mlx-lm's `sanitize` sees the weights, fp8
weights are multiplied by their block scales, which few of mlx-lm's models do, and the heads' tensors are removed,
because mlx-lm drops those of some families and refuses those of others. Weights stay on disk until they are saved.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model

from mtp_mlx.convert.heads.families import Found
from mtp_mlx.convert.heads.other_forms import find_meta
from mtp_mlx.convert.heads.targets import AS_IT_IS, Target, save_targets
from mtp_mlx.convert.read.checkpoint import Checkpoint, fp8_block
from mtp_mlx.convert.read.safetensors import SCALE
from mtp_mlx.errors import ConversionError, MTPError
from mtp_mlx.model.base_sample import BaseSample
from mtp_mlx.model.fingerprint import fingerprint_of, sample_lazily

# What mlx-lm may raise for a folder that it cannot load: its models check little.
LOAD_ERRORS = (
    ImportError,
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NameError,
)
_GENERATION = "generation_config.json"
# Names that only heads have: if no family is recognised, such tensors must not be dropped silently.
_LOOKS_LIKE_HEADS = re.compile(
    r"(^|\.)(mtp(_\w+)?|nextn\w*|eh_proj|enorm|hnorm|extra_heads|medusa\w*|hydra\w*)\."
)
_SHOWN = 20


@dataclass
class Trunk:
    """A trunk as mlx-lm loads it.

    Attributes:
        model: with lazy weights, which can be read only while `open_trunk` is open.
        config: as mlx-lm will save it.
        left_out: names of stored tensors that mlx-lm's model does not use, other than the heads'.
    """

    model: nn.Module
    config: dict[str, Any]
    left_out: list[str] = field(default_factory=list)


@contextmanager
def open_trunk(checkpoint: Checkpoint, found: Found | None, near: Path | None = None) -> Iterator[Trunk]:
    """The trunk of `checkpoint`, usable inside the block.

    Args:
        found: the heads, whose tensors are not the trunk's; None if there are none.
        near: a path on the disk to use for temporary files; None for the system's temporary folder.

    Raises:
        ConversionError: no config.json, a model type that mlx-lm does not know, or tensors that are missing,
            unexpected, or of a wrong shape or type (one message lists them all).
    """
    if not checkpoint.config:
        raise ConversionError(
            f"{checkpoint.path}: there is no config.json beside the weights, so the model is unknown; put the "
            "model's own config.json there"
        )
    if near is not None:
        near = next(folder for folder in near.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".mtp-mlx-trunk-", dir=near) as name:
        folder = Path(name)
        config = _stage(checkpoint, found, folder)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield _load(checkpoint, folder, set() if found is None else found.owned)


# --- the folder that mlx-lm reads ---------------------------------------------------------------------------


def _stage(checkpoint: Checkpoint, found: Found | None, folder: Path) -> dict[str, Any]:
    """Puts the weights into `folder` under the names that mlx-lm expects; returns the configuration."""
    home = checkpoint.folder
    if (home / _GENERATION).is_file():
        shutil.copy(home / _GENERATION, folder)
    config = dict(checkpoint.config)
    if checkpoint.config_name == "params.json":
        targets, config = _meta_trunk(checkpoint)
        save_targets(folder / "model.safetensors", targets, checkpoint.tensors)
    elif checkpoint.container == "safetensors":
        for i, file in enumerate(file for file in checkpoint.files if file not in checkpoint.beside):
            (folder / f"model-{i:05d}.safetensors").symlink_to((home / file).resolve())
    else:
        owned = set() if found is None else found.owned
        targets = [
            Target(name, tensor.shape, ((name, tensor.shape),))
            for name, tensor in checkpoint.tensors.items()
            if name not in owned
        ]
        save_targets(folder / "model.safetensors", targets, checkpoint.tensors)
    return _without_fp8(config) if checkpoint.fp8 else config


def _without_fp8(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration once fp8 weights are dequantised."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = _without_fp8(config["text_config"])
    return config


# The tensors outside the layers: llama's name in mlx-lm -> Meta's.
_META_OUTSIDE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def _meta_trunk(checkpoint: Checkpoint) -> tuple[list[Target], dict[str, Any]]:
    """How Meta's tensors become those of mlx-lm's llama, and that model's config.json.

    Raises ConversionError: tensors that are missing or of a wrong shape.
    """
    # A layer of the trunk has the names of an extra head, under another prefix.
    layers = {
        name.replace("layers.", "extra_heads.", 1): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("layers.")
    }
    found = find_meta(layers, checkpoint.config)
    if found is None:
        raise ConversionError(
            f"{checkpoint.path}: holds no layers under Meta's names (layers.0.attention.wq.weight)"
        )
    targets = []
    for target in found.targets:
        _, layer, _, rest = target.name.split(".", 3)  # heads.{layer}.block.{rest}
        name, shape = target.sources[0]
        stored = name.replace("extra_heads.", "layers.", 1)
        targets.append(replace(target, name=f"model.layers.{layer}.{rest}", sources=((stored, shape),)))
    for name, stored in _META_OUTSIDE.items():
        if stored in checkpoint.tensors:
            shape = checkpoint.tensors[stored].shape
            targets.append(Target(name, shape, ((stored, shape),), AS_IT_IS))
    _check_meta(checkpoint, targets)
    vocabulary = checkpoint.tensors["tok_embeddings.weight"].shape[0]  # params.json says -1 in some releases
    return targets, found.config | {"vocab_size": vocabulary}


def _check_meta(checkpoint: Checkpoint, targets: list[Target]) -> None:
    tensors = checkpoint.tensors
    stored = {name: shape for target in targets for name, shape in target.sources}
    problems = [f"missing {name}" for name in [*stored, *_META_OUTSIDE.values()] if name not in tensors]
    problems += [
        f"{name} is {list(tensors[name].shape)}, {list(shape)} expected"
        for name, shape in stored.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ConversionError(
            f"{checkpoint.path}: tensors of the trunk do not fit params.json: {'; '.join(problems)}"
        )


# --- mlx-lm's loading ---------------------------------------------------------------------------------------


def _load(checkpoint: Checkpoint, folder: Path, owned: Collection[str]) -> Trunk:
    left_out: list[str] = []

    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        model_class, args_class = _get_classes(config)  # load_model's own default
        return _checked(model_class, checkpoint, owned, left_out), args_class

    try:
        model, config = load_model(folder, lazy=True, get_model_classes=classes)
    except MTPError:
        raise
    except LOAD_ERRORS as error:
        if isinstance(error, KeyError) and "model_type" not in checkpoint.text_config:
            reason = f"{checkpoint.config_name} has no model_type"
        else:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ConversionError(
            f"{checkpoint.path}: mlx-lm cannot load the trunk ({reason}); is the checkpoint complete, and does "
            "mlx-lm know its model?"
        ) from error
    model.__class__ = type(model).__mro__[1]  # mlx-lm's class, without the checks
    return Trunk(model, config, left_out)


def _checked(
    model_class: type[nn.Module], checkpoint: Checkpoint, owned: Collection[str], left_out: list[str]
) -> type[nn.Module]:
    """A subclass of mlx-lm's class: `sanitize` gets no heads, and what it returns and drops is checked."""

    class Checked(model_class):  # type: ignore[valid-type, misc]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            given = dequantised(weights, fp8_block(checkpoint.config)) if checkpoint.fp8 else weights
            given = {name: value for name, value in given.items() if name not in owned}
            own = getattr(super(), "sanitize", None)
            kept = dict(given) if own is None else own(dict(given))
            lost = _Lost() if own is None else _lost(own, given, kept)
            _check(checkpoint, self, kept, lost)
            left_out.extend(lost.dropped)
            return cast("dict[str, mx.array]", kept)

    return Checked


def dequantised(weights: Mapping[str, mx.array], block: tuple[int, int]) -> dict[str, mx.array]:
    """`weights` without scales: each fp8 weight is multiplied by its own, lazily, to bfloat16.

    `read.safetensors.dequantised` does the same with numpy, and has checked types and shapes.
    """
    out = dict(weights)
    for name in weights:
        scaled = name.removesuffix(SCALE)
        if scaled == name or scaled not in weights or weights[scaled].dtype != mx.uint8:
            continue
        m, n = weights[scaled].shape[-2:]
        scales = out.pop(name).astype(mx.float32)
        factors = mx.repeat(mx.repeat(scales, block[0], axis=-2)[..., :m, :], block[1], axis=-1)[..., :n]
        out[scaled] = (mx.from_fp8(weights[scaled], dtype=mx.float32) * factors).astype(mx.bfloat16)
    return out


@dataclass
class _Lost:
    """Stored names that `sanitize` drops, and pairs that it gives the same name, so that one of them is lost."""

    dropped: list[str] = field(default_factory=list)
    doubles: list[tuple[str, str]] = field(default_factory=list)


def _lost(
    sanitize: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    given: Mapping[str, mx.array],
    kept: Mapping[str, mx.array],
) -> _Lost:
    """What `sanitize` loses, rather than renames, stacks or splits.

    Renaming, stacking and splitting keep the number of values, so if that is unchanged nothing was lost. Otherwise
    each vanished tensor is passed to `sanitize` alone: if nothing comes out it was dropped, and if it fails because
    the others are missing it is part of a stack.
    """
    lost = _Lost()
    if sum(value.size for value in given.values()) == sum(value.size for value in kept.values()):
        return lost
    origin = {name: name for name in given.keys() & kept.keys()}
    for name in sorted(given.keys() - kept.keys()):
        try:
            outcome = sanitize({name: given[name]})
        except LOAD_ERRORS:
            continue
        if not outcome:
            lost.dropped.append(name)
        lost.doubles += [(name, origin[new]) for new in outcome if new in origin]
        origin |= dict.fromkeys(outcome, name)
    return lost


def _check(checkpoint: Checkpoint, model: nn.Module, weights: Mapping[str, mx.array], lost: _Lost) -> None:
    """Raises one ConversionError that lists every missing, unexpected, lost, misshapen or wrongly typed tensor."""
    wanted = dict(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())))
    problems = [
        f"{name} looks like an MTP head's, but no known kind of head has it"
        for name in lost.dropped
        if _LOOKS_LIKE_HEADS.search(name)
    ]
    problems += [f"{one} and {other} are the same tensor of the model" for one, other in lost.doubles]
    problems += [
        f"missing {name} {list(wanted[name].shape)}" for name in sorted(wanted.keys() - weights.keys())
    ]
    for name, value in sorted(weights.items()):
        if name.rsplit(".", 1)[0] + ".scales" in weights:
            continue  # quantised already: packed as its scales say, which load_model checks
        if name not in wanted:
            problems.append(f"unexpected {name} {list(value.shape)}, neither the trunk's nor a head's")
        elif value.shape != wanted[name].shape:
            problems.append(f"{name} is {list(value.shape)}, {list(wanted[name].shape)} expected")
        elif not mx.issubdtype(value.dtype, mx.floating) and mx.issubdtype(wanted[name].dtype, mx.floating):
            problems.append(
                f"{name} is of type {str(value.dtype).removeprefix('mlx.core.')}, a float type expected"
            )
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ConversionError(
            f"{checkpoint.path}: tensors of the trunk do not fit mlx-lm's model as the configuration describes it "
            f"({len(problems)}): {'; '.join(problems[:_SHOWN])}{more}"
        )


# --- what tells it apart ------------------------------------------------------------------------------------


class TrunkIdentity(NamedTuple):
    """The fingerprint of a trunk and a sample of its weights; or None, and why they are not known."""

    fingerprint: str | None
    unknown_because: str = ""
    sample: BaseSample | None = None


def trunk_identity(checkpoint: Checkpoint, found: Found | None) -> TrunkIdentity:
    """What tells the trunk that `checkpoint` holds apart.

    Only the norms and the sampled layers are read, one layer at a time. Heads can be used without: they are then not
    checked against the model that they are attached to.

    Args:
        found: the heads of the checkpoint, as for `open_trunk`.
    """
    if checkpoint.container != "safetensors" or not checkpoint.path.is_dir():
        return TrunkIdentity(None, "there is no folder of safetensors that mlx-lm could load the trunk from")
    try:
        with open_trunk(checkpoint, found) as trunk:
            fingerprint, reason = fingerprint_of(trunk.model)
            return TrunkIdentity(fingerprint, reason, sample_lazily(trunk.model) if fingerprint else None)
    except (MTPError, ImportError) as error:
        # The folder is published, and where the checkpoint lay on this machine is nobody's business.
        reason = str(error).replace(f"{checkpoint.path}: ", "")
        return TrunkIdentity(None, reason if len(reason) < 200 else f"{reason[:200]} ...")
