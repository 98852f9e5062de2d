"""Finds the mask token of released checkpoints of arXiv 2602.06019 (Multi-Token Prediction via Self-Distillation).

They are fully fine-tuned llama and qwen3 checkpoints whose tokenizer has 32 added tokens, `<|mtp_special_token_0|>`
and so on, of which the first is the mask. The trunk is converted like any other; the mask's embedding goes into the
sidecar `OUT/mtp`. The generator that comes with them (remote code) is neither needed nor run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.model_folder import MaskSidecar, mask_only
from mtp_mlx.errors import ConversionError
from mtp_mlx.model.seams import embedding_shape, find_seams

MASK_TOKEN = "<|mtp_special_token_0|>"
MOST_TOKENS = 16  # k was drawn from 2..16 in training
# How the published evaluations prompt the two models; by model type, because people rename folders.
PROMPTS = {
    "llama": "the chat template",
    "qwen3": "raw: begin-of-text, the question, a blank line; no chat template",
}


@dataclass(frozen=True)
class MaskToken:
    """The mask of a checkpoint.

    Attributes:
        token_id: its id in the checkpoint's vocabulary.
        stops: ids that end a text, from the checkpoint's configuration.
    """

    token_id: int
    stops: tuple[int, ...]


def find_mask(folder: Path) -> MaskToken | None:
    """The mask token of a checkpoint folder, or None if it has none.

    Raises:
        ConversionError: a tokenizer file that is not JSON, or files that disagree about the mask's id.
    """
    found = {
        **_ids(folder / "tokenizer.json", _from_tokenizer),
        **_ids(folder / "tokenizer_config.json", _from_config),
        **_ids(folder / "added_tokens.json", _from_added),
    }
    if not found:
        return None
    if len(set(found.values())) > 1:
        says = ", ".join(f"{name} says {token_id}" for name, token_id in found.items())
        raise ConversionError(
            f"{folder}: the tokenizer's files disagree about the id of {MASK_TOKEN}: {says}; get them again"
        )
    return MaskToken(next(iter(found.values())), _stops(folder))


def mask_sidecar(mask: MaskToken, model: nn.Module, base_name: str) -> MaskSidecar:
    """The sidecar of a converted model, to be put into its folder.

    Args:
        model: the trunk with its weights, cast and quantised as it will be saved.
        base_name: what the sidecar calls the model.

    Raises:
        ConversionError: the embedding matrix has no row for the mask.
    """
    embed = find_seams(model).trunk.embed_tokens
    rows = embedding_shape(embed)[0]
    if mask.token_id >= rows:
        raise ConversionError(
            f"the mask {MASK_TOKEN} has id {mask.token_id}, but the embedding matrix only {rows} rows: weights and "
            "tokenizer do not belong together"
        )
    header = mask_header(
        mask_only(MOST_TOKENS - 1),
        base_name,
        None,
        mask={
            "token": MASK_TOKEN,
            "id": mask.token_id,
            "stops": list(mask.stops),
            "prompt": PROMPTS.get(str(getattr(model, "model_type", "")), "not known"),
        },
    )
    return MaskSidecar.of(model, embed(mx.array([mask.token_id]))[0], header)


def _ids(path: Path, read: Any) -> dict[str, int]:
    """{file name: the mask's id in it}; empty if it has none."""
    if not path.is_file():
        return {}
    content = _json(path)
    token_id = read(content)
    return {} if token_id is None else {path.name: int(token_id)}


def _from_tokenizer(content: dict[str, Any]) -> int | None:
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return added.get(MASK_TOKEN)


def _from_config(content: dict[str, Any]) -> int | None:
    decoder = content.get("added_tokens_decoder", {})
    return next((int(key) for key, token in decoder.items() if token.get("content") == MASK_TOKEN), None)


def _from_added(content: dict[str, Any]) -> int | None:
    return content.get(MASK_TOKEN)


def _stops(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        stops = _json(path).get("eos_token_id") if path.is_file() else None
        if stops is not None:
            return tuple(stops) if isinstance(stops, list) else (int(stops),)
    return ()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}; get the file again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} is not a JSON object; get the file again")
    return content
