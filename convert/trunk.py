"""The trunk of a checkpoint, loaded by mlx-lm's own code: its `load_model`, its model class, its `sanitize`.

mlx-lm reads folders of safetensors. Of whatever the checkpoint is, such a folder is made first: links to the files
where they are safetensors, otherwise (PyTorch files, Meta's names) the tensors written anew. Before `sanitize` sees
them, fp8 weights are multiplied by their block scales, which few of mlx-lm's model files do, and the heads' tensors
are taken out: some families' are dropped by mlx-lm, others' are kept and then refused. Weights stay on disk until
they are saved.
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
from typing import Any, cast

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
from mtp_mlx.model.fingerprint import fingerprint_of

# What mlx-lm raises for a folder it cannot load: its model files check little and fail where they fail.
LOAD_ERRORS = (
    ImportError,
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
)
_GENERATION = "generation_config.json"
# Names that only heads have. Where no family is recognised, tensors of such names must not vanish unsaid.
_LOOKS_LIKE_HEADS = re.compile(
    r"(^|\.)(mtp(_\w+)?|nextn\w*|eh_proj|enorm|hnorm|extra_heads|medusa\w*|hydra\w*)\."
)
_SHOWN = 20


@dataclass
class Trunk:
    """A trunk as mlx-lm loads it.

    Attributes:
        model: its weights are lazy, and gone once the folder they are read from is.
        config: as mlx-lm will save it.
        left_out: stored names that mlx-lm's model has no use for, apart from the heads'.
    """

    model: nn.Module
    config: dict[str, Any]
    left_out: list[str] = field(default_factory=list)


@contextmanager
def open_trunk(checkpoint: Checkpoint, found: Found | None, near: Path | None = None) -> Iterator[Trunk]:
    """The trunk of `checkpoint`, usable inside the block.

    Args:
        found: the heads, whose tensors are not the trunk's; None where there are none.
        near: a path on the disk that what has to be written anew is written to for a while.

    Raises:
        ConversionError: no config.json, a model type that mlx-lm lacks, or tensors that are missing, unexpected,
            misshapen or of a wrong type; every problem is in the one message.
    """
    if not checkpoint.config:
        raise ConversionError(
            f"{checkpoint.path}: there is no config.json beside the weights, without which the model is not known; "
            "put the model's own config.json there"
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
    """Puts the weights into `folder` under names that mlx-lm looks for; returns the configuration."""
    home = checkpoint.folder
    if (home / _GENERATION).is_file():
        shutil.copy(home / _GENERATION, folder)
    config = dict(checkpoint.config)
    if checkpoint.config_name == "params.json":
        targets, config = _meta_trunk(checkpoint)
        save_targets(folder / "model.safetensors", targets, checkpoint.tensors)
    elif checkpoint.container == "safetensors":
        for i, file in enumerate(checkpoint.files):
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
    """The configuration of the weights after dequantising."""
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
    """The tensors of a llama trunk made of Meta's, and its config.json.

    Raises ConversionError: tensors are missing.
    """
    # A layer of the trunk is stored as an extra head is: the same names under another prefix.
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
            reason = f"{checkpoint.config_name} does not say a model_type"
        else:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ConversionError(
            f"{checkpoint.path}: mlx-lm cannot load the trunk ({reason}); is the checkpoint complete, and of a model "
            "that mlx-lm knows?"
        ) from error
    model.__class__ = type(model).__mro__[1]  # mlx-lm's class, without the checks
    return Trunk(model, config, left_out)


def _checked(
    model_class: type[nn.Module], checkpoint: Checkpoint, owned: Collection[str], left_out: list[str]
) -> type[nn.Module]:
    """mlx-lm's class, whose `sanitize` gets no heads, writes down what it drops, and is checked afterwards."""

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
    """`weights` with each fp8 weight times its scales, in bfloat16 and lazily; the scales are gone.

    The same as `safetensors_folder.dequantised`, which has checked that types and shapes fit, on mlx's arrays.
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
    """Stored names that `sanitize` drops, and (one, other) that it gives the same name, so that one is lost."""

    dropped: list[str] = field(default_factory=list)
    doubles: list[tuple[str, str]] = field(default_factory=list)


def _lost(
    sanitize: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    given: Mapping[str, mx.array],
    kept: Mapping[str, mx.array],
) -> _Lost:
    """What does not come out of `sanitize`, as against what it renames, stacks or splits.

    Renaming, stacking and splitting keep the number of values, so where that is the same nothing was lost. Otherwise
    each vanished name is given to it alone: what then comes to nothing was dropped, and what it misses the others
    for is part of a stack.
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
    """Raises one ConversionError with every tensor that is no part of the model, or not as the model needs it."""
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


# --- its fingerprint ----------------------------------------------------------------------------------------


def trunk_fingerprint(checkpoint: Checkpoint, found: Found | None) -> tuple[str | None, str]:
    """The fingerprint of the trunk that `checkpoint` holds; or None, and why it has none.

    Only the norms are read, which the fingerprint is made of. Heads can be used without one: they are then not
    checked against the model that they are attached to.

    Args:
        found: the heads of the checkpoint, as for `open_trunk`.
    """
    if checkpoint.container != "safetensors" or not checkpoint.path.is_dir():
        return None, "there is no folder of safetensors that mlx-lm could load the trunk from"
    try:
        with open_trunk(checkpoint, found) as trunk:
            return fingerprint_of(trunk.model)
    except (MTPError, ImportError) as error:
        # The folder is published, and where the checkpoint lay on this machine is nobody's business.
        reason = str(error).replace(f"{checkpoint.path}: ", "")
        return None, reason if len(reason) < 200 else f"{reason[:200]} ..."
