"""Whether an adapter was made for the model at hand: compares what its header says of its base with the model."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_mlx.adapter_folder import Header
from mtp_mlx.errors import MTPError
from mtp_mlx.model.base_sample import BaseSample

if TYPE_CHECKING:
    import mlx.nn as nn

log = logging.getLogger("mtp_mlx")


def check_base(folder: Path, header: Header, model: nn.Module) -> None:
    """Checks that the adapter in `folder` was made for `model`, in whatever precision.

    Another model is refused, and so is a fine-tuned one where that is certain. Where it may as well be another
    rounding of the base, and where the header does not say enough, a warning is logged: drafts of a wrong adapter are
    accepted less often, but the text stays right.

    Args:
        model: as mlx-lm loads it, attached or not.

    Raises:
        MTPError: if it was made for another base.
    """
    from mtp_mlx.model.fingerprint import base_fingerprint, sample_base

    if header.base_fingerprint is None:
        log.warning("%s does not say which base it was made for, so it is used unchecked", folder)
        return
    compare_fingerprints(f"the adapter {folder}", header, base_fingerprint(model))
    compare_samples(f"the adapter {folder}", header, sample_base(model))


def compare_fingerprints(what: str, header: Header, found: str) -> None:
    """Refuses another base model.

    Args:
        what: the adapter, in words, to begin the message with.
        found: the fingerprint of the model at hand.

    Raises:
        MTPError: the fingerprints differ; both are named.
    """
    if found != header.base_fingerprint:
        raise MTPError(
            f"{what} was made for base '{header.base_name}' (fingerprint {header.base_fingerprint}), "
            f"this model's fingerprint is {found}; use it with its own base or train one for this model"
        )


def compare_samples(what: str, header: Header, found: BaseSample) -> None:
    """Refuses a fine-tune of the base model, or warns of it if it may as well be another rounding.

    Args:
        what: the adapter, in words, to begin the message with.
        found: the sample of the model at hand.

    Raises:
        MTPError: the model's weights differ from the base's for sure.
    """
    if header.base_sample is None:
        _tell_once(
            f"{what} has an older fingerprint of its base, which does not notice a fine-tune merged into it: if "
            "drafts are rarely accepted, check that this is the model it was made for"
        )
        return
    if not header.base_sample.comparable(found):
        log.warning(
            "%s was made for base '%s', whose layers have other names or another number than this model's here, so "
            "their weights cannot be compared: if drafts are rarely accepted, check that this is the model it was "
            "made for",
            what,
            header.base_name,
        )
        return
    verdict = header.base_sample.against(found)
    if verdict == "differs":
        raise MTPError(
            f"{what} was made for base '{header.base_name}', and this model's weights differ from that base's, "
            "though its norms are the same: a fine-tune was merged into them; use it with its own base or train one "
            "for this model"
        )
    if verdict == "may differ":
        log.warning(
            "%s was made for base '%s', and this model's weights (%s) differ from that base's (%s) by more than "
            "rounding explains: it was fine-tuned, or quantised by a method that does more than round, so drafts may "
            "be accepted less often; the text is right either way",
            what,
            header.base_name,
            found.form,
            header.base_sample.form,
        )


@lru_cache(maxsize=256)
def _tell_once(message: str) -> None:
    log.warning(message)
