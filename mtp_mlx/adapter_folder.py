"""The adapter folder: `mtp_config.json`, `mtp.safetensors` and a generated `README.md`.

The config names the base by a fingerprint, the adapter's shape, how it was trained and what acceptance was
measured. A fingerprint that differs from the base at hand is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.errors import MTPError
from mtp_mlx.model.fingerprint import base_fingerprint

CONFIG_NAME = "mtp_config.json"
WEIGHTS_NAME = "mtp.safetensors"
FORMAT_VERSION = 1


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `mtp_config.json`, whatever its method.

    Raises:
        MTPError: no adapter there, or its config is no JSON object.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise MTPError(f"{folder} is no adapter folder: it has no {CONFIG_NAME}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MTPError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise MTPError(f"{path} is damaged: it does not hold a config")
    return raw


def check_base(folder: Path, base_name: str, fingerprint: str, model: nn.Module) -> None:
    """Raises MTPError where the adapter in `folder` was made for another base (both fingerprints shown)."""
    found = base_fingerprint(model)
    if found != fingerprint:
        raise MTPError(
            f"the adapter {folder} was trained for base '{base_name}' (fingerprint {fingerprint}), "
            f"this model's fingerprint is {found}; use it with its own base or train one for this model"
        )


def read_tensors(folder: Path) -> dict[str, mx.array]:
    """Every tensor of an adapter folder, by name.

    Raises:
        MTPError: the file is missing or damaged.
    """
    path = Path(folder) / WEIGHTS_NAME
    try:
        tensors = cast(dict[str, mx.array], mx.load(str(path)))
        mx.eval(tensors)
    except (RuntimeError, ValueError, OSError) as error:
        raise MTPError(f"{path} is missing or damaged: {error}") from error
    return tensors
