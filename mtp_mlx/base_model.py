"""The one way to load a bare mlx-lm model, for every verb, the server and the examples.

mlx-lm and transformers check little: a folder that cannot be loaded, or that cannot be run, ends in whatever error
their code comes upon first. Here it is one sentence that says which file is at fault and how to mend it
(`mtp_mlx/model_faults.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _download, load_model, load_tokenizer

from mtp_mlx.errors import MTPError
from mtp_mlx.hub_errors import hub_errors
from mtp_mlx.model_faults import ends_fault, model_fault, read_config, tokenizer_fault
from mtp_mlx.models import EMBEDDED, resolve_model


def load_base(
    name_or_path: str | Path,
    quantize: int | None = None,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    lazy: bool = False,
    folder: Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, TokenizerWrapper]:
    """A bare mlx-lm model and its tokenizer, by the names that `resolve_model` knows.

    Args:
        quantize: 4 or 8 bits, for the embedded model only.
        tokenizer_config: as `mlx_lm.load`.
        lazy: read weights when they are first used.
        folder: that `local_folder` has found; None to look for it.
        trust_remote_code: run the code that the model and its tokenizer may come with, as in mlx-lm.

    Raises:
        MTPError: if there is no such model, it cannot be fetched or loaded, or it cannot run.
    """
    folder = folder or local_folder(name_or_path, quantize)
    again = f" (delete {folder} to have it made again)" if str(name_or_path) in EMBEDDED else ""
    what = f"the model {name_or_path} could not be loaded{again}"
    model, config = read_model(folder, what, lazy=lazy, trust_remote_code=trust_remote_code)
    options = {**(tokenizer_config or {}), **({"trust_remote_code": True} if trust_remote_code else {})}
    tokenizer = read_tokenizer(folder, what, config, options or None)
    return model, tokenizer


def local_folder(name_or_path: str | Path, quantize: int | None = None) -> Path:
    """The folder of a model, which is fetched first if it is named by a hub id.

    Raises:
        MTPError: if there is no such model, or it cannot be fetched.
    """
    path = resolve_model(name_or_path, quantize=quantize)
    if isinstance(path, Path):
        return path
    with hub_errors(f"the model {name_or_path} could not be fetched"):
        return _download(path)


def read_model(
    folder: Path, what: str, *, lazy: bool, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The bare model in a folder, and its config as mlx-lm reads it.

    Args:
        what: what failed, to begin the message with.
        lazy: read weights when they are first used.
        trust_remote_code: run the code in the folder, if the model is built by it.

    Raises:
        MTPError: if mlx-lm cannot load it, or it fails on a single token.
    """
    try:
        config = read_config(folder)
    except MTPError as error:
        raise MTPError(f"{what}: {error}") from error
    try:
        model, loaded = load_model(folder, lazy=lazy, trust_remote_code=trust_remote_code)
        model(mx.array([[0]]), cache=make_prompt_cache(model))  # shapes and types; nothing is computed
    # The models of mlx-lm raise anything where a config or a tensor is not as they expect, and one ends the program.
    except (Exception, SystemExit) as error:
        raise MTPError(f"{what}: {model_fault(folder, config, error)}") from error
    return model, loaded


def read_tokenizer(
    folder: Path, what: str, config: dict[str, Any], options: dict[str, Any] | None = None
) -> TokenizerWrapper:
    """The tokenizer in a model folder.

    Args:
        what: what failed, to begin the message with.
        config: the model's, from `read_model`.
        options: as `tokenizer_config` of `mlx_lm.load`.

    Raises:
        MTPError: if there is none, or it cannot be loaded.
    """
    try:
        tokenizer = load_tokenizer(folder, options, eos_token_ids=config.get("eos_token_id"))
        fault = ends_fault(tokenizer) or (None if len(tokenizer) > 1 else tokenizer_fault(folder, None))
    except Exception as error:  # transformers reads half a dozen files, and checks few of them
        raise MTPError(f"{what}: {tokenizer_fault(folder, error)}") from error
    if fault:
        raise MTPError(f"{what}: {fault}")
    return tokenizer


def also_ends_at(tokenizer: TokenizerWrapper, token: str) -> None:
    """Makes `token`, a token or its id, end texts too.

    Raises:
        MTPError: if the tokenizer has no such token.
    """
    known = int(token) if token.isdigit() else tokenizer.convert_tokens_to_ids(token)
    if known is None or known >= len(tokenizer) or known == getattr(tokenizer, "unk_token_id", None):
        raise MTPError(
            f"`extra_eos_token` {token!r} is not a token of this model: give one of its tokens, or an id"
        )
    tokenizer.add_eos_token(token)
