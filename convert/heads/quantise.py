"""Quantises converted heads, as mlx-lm quantises a trunk (`mtp-mlx convert --quantize-heads 4`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mtp_mlx.adapter_folder import put_adapter, read_header, read_tensors
from mtp_mlx.convert.heads.packed import Packing, described
from mtp_mlx.drafters.heads.config import card_lines, config_of
from mtp_mlx.errors import ConversionError

GROUP_SIZE = 64
_ROUTERS = ("gate", "router")  # ends of names: what chooses experts is small, and stays as it is


def quantise_folder(folder: Path, bits: int) -> None:
    """Quantises the matrices of the heads in `folder`, an adapter folder that is being made, in place.

    Routers stay, and matrices whose width is no multiple of a group.

    Raises MTPError: heads that are quantised already, or none of whose matrices can be.
    """
    header = read_header(folder)
    config, tensors = config_of(folder, header), read_tensors(folder)
    if config.quantization:
        raise ConversionError("the heads are quantised already: leave `quantize_heads` out")
    packing, packings, out = Packing(GROUP_SIZE, bits), {}, {}
    for name, value in tensors.items():
        stem, _, last = name.rpartition(".")
        if last != "weight" or value.ndim < 2 or value.shape[-1] % GROUP_SIZE or stem.endswith(_ROUTERS):
            out[name] = value
            continue
        weight, scales, biases = mx.quantize(value, GROUP_SIZE, bits)
        out |= {name: weight, f"{stem}.scales": scales, f"{stem}.biases": biases}
        packings[stem] = packing
    if not packings:
        raise ConversionError(
            f"`quantize_heads` needs matrices whose width is a multiple of {GROUP_SIZE}, and these heads have none: "
            "leave it out"
        )
    config = replace(config, quantization=described(packings))
    header = replace(header, own={**header.own, "heads": config.to_json()})
    types = {name: value.dtype for name, value in out.items()}
    put_adapter(folder, header, out, card_lines(folder, header), types)
