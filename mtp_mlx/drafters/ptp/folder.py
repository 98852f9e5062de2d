"""Parallel Token Prediction in an adapter folder: its section of the header, its lines of the model card.

The section holds the variant, the embedding of uniforms, and the sampling of the teacher, on which uniforms are
conditional.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.adapter_folder import (
    DRAFT_IDS,
    CardLines,
    Header,
    check_method,
    damage,
    paper,
    read_tensors,
    write_adapter_folder,
)
from mtp_mlx.base_check import check_base
from mtp_mlx.drafters.ptp.config import PTPConfig, TeacherSampling
from mtp_mlx.drafters.ptp.weights import PTPAdapter, new_ptp_adapter

METHOD = "ptp"

log = logging.getLogger("mtp_mlx")


def ptp_header(config: PTPConfig, base_name: str, base_fingerprint: str | None, **about: Any) -> Header:
    """The header of a PTP adapter; `about`: what else `Header` holds."""
    own = {"adapter": dataclasses.asdict(config) | {"target_modules": list(config.target_modules)}}
    return Header(METHOD, base_name, base_fingerprint, own, **about)


def config_of(folder: Path, header: Header) -> PTPConfig:
    """The adapter's shape and its teacher's sampling, as the header of `folder` says them.

    Raises:
        MTPError: if the folder is of another method, or damaged.
    """
    check_method(folder, header, METHOD)
    with damage(folder):
        section = dict(header.own["adapter"])
        section["target_modules"] = tuple(section.get("target_modules", ()))
        section["teacher"] = TeacherSampling(**section["teacher"])
        return PTPConfig(**section)


def load(folder: Path, header: Header, model: nn.Module) -> tuple[PTPAdapter, Header]:
    """The adapter in `folder` for a bare `model`.

    Raises:
        MTPError: if the folder is of another method, for another base, or damaged.
    """
    config = config_of(folder, header)
    check_base(folder, header, model)
    tensors = read_tensors(folder)
    if config.variant == "c" and DRAFT_IDS in tensors:
        log.warning(
            "%s: this C-PTP adapter drafts from %s ids, by whose distribution it picks other tokens than the model "
            "does by that of all ids: fewer drafts are accepted than could be. Train it again for all ids",
            folder,
            f"{len(tensors[DRAFT_IDS]):,}",
        )
    adapter = new_ptp_adapter(model, config, tensors.get(DRAFT_IDS))
    adapter.load_tensors(tensors)
    return adapter, header


def save(folder: Path, adapter: PTPAdapter, header: Header, dtype: mx.Dtype = mx.bfloat16) -> None:
    """Writes the folder whole or not at all; weights in `dtype`.

    Raises:
        MTPError: if it cannot be written.
    """
    write_adapter_folder(folder, header, adapter.tensors(), card_lines(folder, header), dtype)


def facts(folder: Path, header: Header) -> dict[str, Any]:
    """What `mtp-mlx info` shows of the method's own section."""
    return {"shape": dataclasses.asdict(config_of(folder, header))}


def card_lines(folder: Path, header: Header) -> CardLines:
    """The method's lines of the model card."""
    config = config_of(folder, header)
    kind = {"o": "O-PTP, one-hot", "c": "C-PTP, categorical"}[config.variant]
    control = "; slots without uniforms (ablation)" if config.independent else ""
    sampling = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(config.teacher).items())
    return CardLines(
        title=f"Parallel Token Prediction adapter for {header.base_name}",
        about=(
            "Slots carry the uniforms of inverse-CDF sampling. The base model's own output is unchanged: drafts are\n"
            "verified, and the adapter acts on slot rows only."
        ),
        method=paper("Parallel Token Prediction", "2512.21323"),
        facts=(
            f"{kind}; uniforms embedded as {config.embedding}{control}",
            f"slots {config.slots}, rank {config.rank}, alpha {config.alpha:g}",
            f"its teacher's sampling: {sampling}; with another sampling fewer drafts are accepted",
        ),
        commands=(
            f"mtp-mlx generate --model {header.base_name} --adapter . --temp {config.teacher.temperature:g} "
            "--prompt ...",
        ),
    )
