"""The trunk of a checkpoint in Meta's own names (consolidated.pth and params.json) under those of Hugging Face."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mtp_mlx.errors import ConversionError

from .checkpoint import Checkpoint
from .families_other import find_meta
from .heads import AS_IT_IS, Target

_OUTSIDE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def meta_trunk(checkpoint: Checkpoint) -> tuple[list[Target], dict[str, Any]]:
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
    for name, stored in _OUTSIDE.items():
        if stored in checkpoint.tensors:
            shape = checkpoint.tensors[stored].shape
            targets.append(Target(name, shape, ((stored, shape),), AS_IT_IS))
    _check(checkpoint, targets)
    vocabulary = checkpoint.tensors["tok_embeddings.weight"].shape[0]  # params.json says -1 in some releases
    return targets, found.config | {"vocab_size": vocabulary}


def _check(checkpoint: Checkpoint, targets: list[Target]) -> None:
    tensors = checkpoint.tensors
    stored = {name: shape for target in targets for name, shape in target.sources}
    problems = [f"missing {name}" for name in [*stored, *_OUTSIDE.values()] if name not in tensors]
    problems += [
        f"{name} is {list(tensors[name].shape)}, {list(shape)} expected"
        for name, shape in stored.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ConversionError(
            f"{checkpoint.path}: tensors of the trunk do not fit params.json: {'; '.join(problems)}"
        )
