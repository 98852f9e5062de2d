"""Takes a Gemma 4 assistant over: its tensors as they are, under their own names, as an adapter of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mtp_mlx.adapter_folder import WEIGHTS_NAME, model_card, put_texts, read_tensors, tensor_sizes
from mtp_mlx.convert.heads.packed import described, unpacked
from mtp_mlx.convert.heads.targets import Target, save_targets
from mtp_mlx.convert.heads.write import Base
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.convert.read.lazy_tensor import FLOATS, LazyTensor
from mtp_mlx.drafters.gemma4_assistant.config import AssistantConfig, assistant_header, card_lines
from mtp_mlx.drafters.gemma4_assistant.folder import ORDERING
from mtp_mlx.drafters.gemma4_assistant.target import read_target
from mtp_mlx.drafters.gemma4_assistant.weights import Assistant
from mtp_mlx.errors import ConversionError

_INTEGERS = ("I64", "I32")
_MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
_SHOWN = 8  # problems listed before the rest is only counted


def fill_assistant(folder: Path, checkpoint: Checkpoint, base: Base, model: nn.Module) -> None:
    """Writes the files of an adapter folder into the existing folder `folder`.

    Args:
        checkpoint: of an assistant (`is_assistant`).
        base: the model that it is for.
        model: the same, bare.

    Raises MTPError: the configuration or the tensors are not those of an assistant, or it is for another model.
    """
    name = checkpoint.config_name or "its configuration"
    try:
        config = AssistantConfig.of(checkpoint.config)
        own = Assistant(config)
    except _MISFITS as error:
        raise ConversionError(
            f"{checkpoint.path}: {name} does not describe a Gemma 4 assistant ({error}); use its own config.json"
        ) from error
    read_target(config, model)
    targets = [
        Target(path, value.shape, ((path, value.shape),), dtypes=_INTEGERS if path == ORDERING else FLOATS)
        for path, value in cast("list[tuple[str, mx.array]]", tree_flatten(own.parameters()))
    ]
    try:
        targets, packings = unpacked(targets, checkpoint.tensors)
    except ConversionError as error:  # what raised it does not know the path
        raise ConversionError(f"{checkpoint.path}: {error}") from error
    _check(checkpoint.path, targets, checkpoint.tensors, config)
    save_targets(folder / WEIGHTS_NAME, targets, checkpoint.tensors)
    header = assistant_header(
        replace(config, quantization=described(packings)),
        base.name,
        base.fingerprint,
        source={"family": "Gemma 4 assistant", "files": checkpoint.files, "notes": base.notes},
        base_sample=base.sample,
    )
    sizes = tensor_sizes(read_tensors(folder, lazy=True))
    put_texts(folder, header, model_card(header, card_lines(folder, header), sizes))


def _check(
    path: Path, targets: list[Target], tensors: Mapping[str, LazyTensor], config: AssistantConfig
) -> None:
    """Raises one ConversionError that lists every missing, unexpected, misshapen or wrongly typed tensor."""
    problems = []
    for target in targets:
        found = tensors.get(target.name)
        if found is None:
            problems.append(f"missing {target.name} {list(target.shape)}")
        elif found.shape != target.shape:
            problems.append(f"{target.name} is {list(found.shape)}, {list(target.shape)} expected")
        elif found.dtype not in target.dtypes:
            problems.append(f"{target.name} is of type {found.dtype}, not {' or '.join(target.dtypes)}")
    wanted = {target.name for target in targets}
    copies = "lm_head." if config.tie_word_embeddings else "\n"  # of the embedding, which some files have
    odd = [name for name in sorted(tensors.keys() - wanted) if not name.startswith(copies)]
    problems += [f"unexpected {name} {list(tensors[name].shape)}" for name in odd]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ConversionError(
            f"{path}: its tensors are not those of the Gemma 4 assistant that its configuration describes "
            f"({len(problems)}): {'; '.join(problems[:_SHOWN])}{more}"
        )
