"""Load the model that a verb's options name. mlx is imported only when it is called."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mtp_mlx.cli.options import LoadingOptions

if TYPE_CHECKING:
    from mtp_mlx.model.attach import AttachedModel


def loading_arguments(settings: Any) -> dict[str, Any]:
    """The options of single drafters in a verb's settings, as arguments of `mtp_mlx.load`."""
    return {field.name: getattr(settings, field.name) for field in fields(LoadingOptions)}


def load_model(settings: Any, **more: Any) -> tuple[AttachedModel, Any]:
    """Load the attached model and the tokenizer; `more` are further arguments of `mtp_mlx.load`.

    Raises:
        MTPError: see `mtp_mlx.load`.
    """
    from mtp_mlx.api import load

    adapter = None if settings.adapter == "none" else settings.adapter
    return load(
        settings.model,
        adapter,
        quantize=settings.quantize,
        exact=settings.exact,
        **loading_arguments(settings),
        **more,
    )
