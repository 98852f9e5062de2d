"""Files of prompt caches, in mlx-lm's format: what a model has read, to go on behind it without reading it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mtp_mlx.errors import MTPError
from mtp_mlx.files import user_path, write_file

# Entries of the metadata, which mlx-lm ignores.
TOKENS = "mtp_mlx_tokens"
MORE = "mtp_mlx_more"


@dataclass(frozen=True)
class Described:
    """What a file says about its prompt cache.

    Attributes:
        tokens: ids that the cache holds; none if the file does not say.
        model: as the user named it.
        made_by: the model, as whoever wrote the file tells models apart; "" if the file does not say.
        ends: shorter lengths of the text of which the file has copies of what cannot be trimmed.
        trims: whether the cache of the shortest of all these lengths can be trimmed.
        layers: the first caches in the file, which are those of layers; the others are copies. None for all.
    """

    tokens: list[int]
    model: str = ""
    made_by: str = ""
    ends: tuple[int, ...] = ()
    trims: bool = False
    layers: int | None = None


def write(path: Path, cache: list[Any], said: Described, copies: Sequence[Any] = ()) -> None:
    """Writes a prompt cache so that mlx-lm reads it too.

    Args:
        cache: a cache for each layer.
        said: what it is, except the number of layers.
        copies: at each of the ends, copies of what cannot be trimmed, the same number at each.

    Raises:
        MTPError: if the file cannot be written.
    """
    metadata = {"model": said.model, "tokenizer_config": "{}", TOKENS: json.dumps(said.tokens)}
    if said.made_by:
        metadata[MORE] = json.dumps([said.made_by, said.ends, said.trims, len(cache)])
    caches = [*cache, *copies]
    write_file(path, lambda temporary: save_prompt_cache(str(temporary), caches, metadata))


def describe(path: Path) -> Described:
    """What a file says about its cache, without reading that.

    Raises:
        ValueError: if it says nothing that can be understood.
    """
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)  # lazy
        metadata: dict[str, str] = loaded[1]
        return _described({key[2:]: value for key, value in metadata.items() if key.startswith("0.")})
    except Exception as error:  # mlx checks little of a file
        raise ValueError(f"{path} is no file of a prompt cache ({type(error).__name__})") from error


def _described(metadata: dict[str, str]) -> Described:
    tokens = [int(token) for token in json.loads(metadata.get(TOKENS, "[]"))]
    model = metadata.get("model", "")
    if MORE not in metadata:
        return Described(tokens, model)
    made_by, ends, trims, layers = json.loads(metadata[MORE])
    return Described(tokens, model, str(made_by), tuple(int(n) for n in ends), bool(trims), int(layers))


def read_all(path: Path) -> tuple[list[Any], list[Any], Described]:
    """(a cache for each layer, all copies at shorter lengths in succession, what the file says).

    Raises:
        MTPError: if there is no such file, or it is none of mlx-lm's prompt caches.
    """
    path = user_path(str(path))
    if not path.is_file():
        raise MTPError(f"{path}: there is no such file; make one with `mtp-mlx cache-prompt`")
    try:
        cache, metadata = load_prompt_cache(str(path), return_metadata=True)
        mx.eval([layer.state for layer in cache])
        said = _described(metadata)
    except Exception as error:  # mlx and mlx-lm check little of a file
        raise MTPError(
            f"{path} is not a prompt cache that mlx-lm or mtp-mlx wrote, or it is damaged "
            f"({type(error).__name__}); make it again with `mtp-mlx cache-prompt`"
        ) from error
    layers = len(cache) if said.layers is None else said.layers
    return cache[:layers], cache[layers:], said


def read(path: Path) -> tuple[list[Any], list[int]]:
    """(a cache for each layer, the token ids that it holds; none if the file does not say).

    Raises:
        MTPError: as `read_all`.
    """
    cache, _, said = read_all(path)
    return cache, said.tokens
