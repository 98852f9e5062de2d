"""Mask tokens in an adapter folder: their section of the header, their lines of the model card."""

from __future__ import annotations

import dataclasses
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
from mtp_mlx.drafters.masks.weights import MaskAdapter, MaskAdapterConfig, new_adapter

METHOD = "mask-tokens"


def mask_header(
    config: MaskAdapterConfig, base_name: str, base_fingerprint: str | None, **about: Any
) -> Header:
    """The header of a mask-token adapter; `about`: what else `Header` holds."""
    own = {"adapter": dataclasses.asdict(config) | {"target_modules": list(config.target_modules)}}
    return Header(METHOD, base_name, base_fingerprint, own, **about)


def config_of(folder: Path, header: Header) -> MaskAdapterConfig:
    """The adapter's shape, as the header of `folder` says it.

    Raises:
        MTPError: if the folder is of another method, or damaged.
    """
    check_method(folder, header, METHOD)
    with damage(folder):
        section = dict(header.own["adapter"])
        section["target_modules"] = tuple(section.get("target_modules", ()))
        return MaskAdapterConfig(**section)


def load(folder: Path, header: Header, model: nn.Module) -> tuple[MaskAdapter, Header]:
    """The adapter in `folder` for a bare `model`.

    Raises:
        MTPError: if the folder is of another method, for another base, or damaged.
    """
    config = config_of(folder, header)
    check_base(folder, header, model)
    tensors = read_tensors(folder)
    adapter = new_adapter(model, config, tensors.get(DRAFT_IDS))
    adapter.load_tensors(tensors)
    return adapter, header


def save(folder: Path, adapter: MaskAdapter, header: Header, dtype: mx.Dtype = mx.bfloat16) -> None:
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
    return CardLines(
        title=f"Mask-token adapter for {header.base_name}",
        about=(
            "The base model's own output is unchanged: drafts are verified, and the adapter acts on slot rows only."
        ),
        method=(
            paper("one mask token by online self-distillation, gated LoRA", "2602.06019")
            if config.shared_mask
            else paper("gated-LoRA mask tokens", "2507.11851")
        ),
        facts=(f"slots {config.slots}, rank {config.rank}, alpha {config.alpha:g}",),
    )
