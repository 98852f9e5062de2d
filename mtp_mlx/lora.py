"""A fine-tune that mlx-lm trained (`mlx_lm.lora`), on top of its base model: the layers that it updates are wrapped.

A drafter that was trained for the base goes on drafting. The text is that of the model with the fine-tune, as in
mlx-lm; drafts are only accepted less often, the more the fine-tune changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tuner.utils import load_adapters

from mtp_mlx.errors import MTPError
from mtp_mlx.files import user_path

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


def put_on(model: nn.Module, folder: str | Path) -> str:
    """Puts the fine-tune in `folder` on a bare model, in place; returns what the user should know of it.

    Raises:
        MTPError: if it is none of mlx-lm's, or does not fit the model.
    """
    path = user_path(str(folder))
    config = _config(path)
    try:
        load_adapters(model, str(path))
    except (OSError, RuntimeError) as error:
        raise MTPError(f"{path / WEIGHTS}: cannot be read ({error}); copy or train it again") from error
    except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise MTPError(
            f"the fine-tune {path} does not fit this model ({type(error).__name__}: {reason[:200]}); give "
            "`adapter_path` with the model that it was trained on"
        ) from error
    model.eval()
    kind = str(config.get("fine_tune_type", "lora"))
    return (
        f"the fine-tune {path} ({kind}) is on the model; the adapter drafts for the base without it, so drafts may "
        "be accepted less often"
    )


def _config(path: Path) -> dict[str, Any]:
    """The settings of a fine-tune.

    Raises:
        MTPError: if the folder has none, or they are damaged.
    """
    if (path / "mtp_config.json").exists():
        raise MTPError(f"{path} is an adapter of mtp-mlx, not a fine-tune of mlx-lm: give it as `adapter`")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise MTPError(
            f"`adapter_path` must be a folder that mlx_lm.lora wrote: {path / CONFIG} cannot be read "
            f"({error.strerror})"
        ) from error
    except ValueError as error:
        raise MTPError(f"{path / CONFIG} is damaged ({error}); copy or train it again") from error
    if not isinstance(config, dict):
        raise MTPError(f"{path / CONFIG} is damaged: it is not an object; copy or train it again")
    return config
