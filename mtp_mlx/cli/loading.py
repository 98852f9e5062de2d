"""Load the model that a verb's options name. mlx is imported only when it is called."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

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
    from mtp_mlx.base_model import also_ends_at

    adapter = None if settings.adapter == "none" else settings.adapter
    model, tokenizer = load(
        settings.model,
        adapter,
        heads=settings.heads,
        quantize=settings.quantize,
        exact=settings.exact,
        adapter_path=settings.adapter_path,
        trust_remote_code=settings.trust_remote_code,
        **loading_arguments(settings),
        **more,
    )
    for token in getattr(settings, "extra_eos_token", ()):
        also_ends_at(tokenizer, token)
    _say_if_nothing_drafts(settings, model)
    return model, tokenizer


def _say_if_nothing_drafts(settings: Any, model: AttachedModel) -> None:
    """One line on stderr about a model without a drafter, unless the user wants none."""
    from mtp_mlx.adapter_sources import unconverted_heads
    from mtp_mlx.decode.drafter import source_of

    layout = getattr(settings, "layout", ())
    layouts = {layout} if isinstance(layout, str) else {*layout}
    wants_none = settings.adapter == "none" or (layouts and not layouts & {"auto", "tree"})
    if wants_none or source_of(model) is not None or model.text_source is not None or not model.peers.leads:
        return
    inside = unconverted_heads(settings.model)
    if inside is None:
        help = (
            "--heads SOURCE takes over MTP heads, --draft-model a smaller model, --memory drafts from earlier texts, "
            "and `mtp-mlx train` makes heads"
        )
    else:
        help = f"it holds MTP heads ({inside}), which --heads {settings.model} takes over"
    click.echo(f"note: {settings.model} has no drafter, so only repeated text is drafted: {help}", err=True)


def speed_name(settings: Any) -> str:
    """The name under which the plain speed of a verb's model is remembered: a fine-tune on it makes it another."""
    return settings.model if settings.adapter_path is None else f"{settings.model} + {settings.adapter_path}"
