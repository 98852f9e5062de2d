"""An assistant in an adapter folder: loading. What the folder says of it is in `config.py`."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mtp_mlx.adapter_folder import WEIGHTS_NAME, Header, damage, read_tensors
from mtp_mlx.base_check import check_base
from mtp_mlx.drafters.gemma4_assistant.config import card_lines, config_of, facts
from mtp_mlx.drafters.gemma4_assistant.source import Gemma4Assistant
from mtp_mlx.drafters.gemma4_assistant.target import read_target
from mtp_mlx.drafters.gemma4_assistant.weights import Assistant
from mtp_mlx.errors import MTPError
from mtp_mlx.model.tensor_fit import check_fit, quantise_like

__all__ = ["card_lines", "facts", "load"]

ORDERING = "masked_embedding.token_ordering"


def load(folder: Path, header: Header, model: nn.Module) -> tuple[Gemma4Assistant, Header]:
    """The assistant in `folder` for a bare `model`, in the types it is stored in.

    Raises:
        MTPError: if the folder is of another method, for another base, or damaged.
    """
    config = config_of(folder, header)
    check_base(folder, header, model)
    target = read_target(config, model)
    tensors = read_tensors(folder)
    with damage(folder):
        assistant = Assistant(config)
        quantise_like(assistant, tensors.keys(), config.quantization)
    check_fit(dict(tree_flatten(assistant.parameters())), tensors)
    if ORDERING in tensors:
        tensors[ORDERING] = _checked_order(folder, tensors[ORDERING])
    assistant.update(tree_unflatten(list(tensors.items())))
    assistant.eval()
    # Constants too, such as those of rotary embeddings: a lazy array belongs to the thread that made it.
    mx.eval(
        [value for module in assistant.modules() for value in module.values() if isinstance(value, mx.array)]
    )
    return Gemma4Assistant(assistant, config, target), header


def _checked_order(folder: Path, order: mx.array) -> mx.array:
    """The order of the tokens, [V] int32.

    Raises:
        MTPError: if it is not every token once: MLX would read beyond the embedding for it.
    """
    whole = mx.array_equal(mx.sort(order), mx.arange(order.size, dtype=order.dtype))
    if not mx.issubdtype(order.dtype, mx.integer) or not whole.item():
        raise MTPError(f"{folder / WEIGHTS_NAME} is damaged: {ORDERING} does not name every token once")
    return order.astype(mx.int32)
