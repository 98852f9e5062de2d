"""Files of prompt caches, in mlx-lm's format: what a model has read, to go on behind it without reading it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mtp_mlx.errors import MTPError
from mtp_mlx.files import user_path, write_file

TOKENS = "mtp_mlx_tokens"  # entry of the metadata, which mlx-lm ignores


def write(path: Path, cache: list[Any], model: str, tokens: list[int]) -> None:
    """Writes a prompt cache so that mlx-lm reads it too.

    Args:
        cache: a cache for each layer.
        model: as the user named it.
        tokens: the token ids that the cache holds.

    Raises:
        MTPError: if the file cannot be written.
    """
    metadata = {"model": model, "tokenizer_config": "{}", TOKENS: json.dumps(tokens)}
    write_file(path, lambda temporary: save_prompt_cache(str(temporary), cache, metadata))


def read(path: Path) -> tuple[list[Any], list[int]]:
    """(a cache for each layer, the token ids that it holds; none if the file does not say).

    Raises:
        MTPError: if there is no such file, or it is none of mlx-lm's prompt caches.
    """
    path = user_path(str(path))
    if not path.is_file():
        raise MTPError(f"{path}: there is no such file; make one with `mtp-mlx cache-prompt`")
    try:
        cache, metadata = load_prompt_cache(str(path), return_metadata=True)
        mx.eval([layer.state for layer in cache])
        tokens = [int(token) for token in json.loads(metadata.get(TOKENS, "[]"))]
    except Exception as error:  # mlx and mlx-lm check little of a file
        raise MTPError(
            f"{path} is not a prompt cache that mlx-lm or mtp-mlx wrote, or it is damaged "
            f"({type(error).__name__}); make it again with `mtp-mlx cache-prompt`"
        ) from error
    return cache, tokens
