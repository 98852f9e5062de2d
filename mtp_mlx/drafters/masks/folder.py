"""The adapter folder of mask tokens: its part of the config, its model card."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.adapter_folder import (
    CONFIG_NAME,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    check_base,
    read_config,
    read_tensors,
)
from mtp_mlx.drafters.masks.weights import MaskAdapter, MaskAdapterConfig, new_adapter
from mtp_mlx.errors import MTPError
from mtp_mlx.files import new_folder

METHOD = "mask-tokens"


@dataclass
class AdapterInfo:
    """What an adapter folder says about itself, apart from weights.

    Attributes:
        base_name: the base model as the user named it.
        base_fingerprint: see `base_fingerprint`.
        shape: the adapter's shape.
        training: provenance: objective, data, steps, rows, settings.
        acceptance: measured acceptance per depth on held-out text.
        measurements: named reports (tokens per step by category, ...), free-form.
        mask: of a model with a mask token of its own: the token's id and name, and how its makers prompt and stop
            it; free-form and for people, decoding reads the mask's embedding from the weights.
    """

    base_name: str
    base_fingerprint: str
    shape: MaskAdapterConfig
    training: dict[str, Any] = field(default_factory=dict)
    acceptance: list[float] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)
    mask: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of `mtp_config.json`."""
        return {
            "format": FORMAT_VERSION,
            "method": METHOD,
            "base": {"name": self.base_name, "fingerprint": self.base_fingerprint},
            "adapter": dataclasses.asdict(self.shape),
            "training": self.training,
            "acceptance": self.acceptance,
            "measurements": self.measurements,
            **({"mask": self.mask} if self.mask else {}),
        }


def save_adapter(
    folder: Path, adapter: MaskAdapter, info: AdapterInfo, dtype: mx.Dtype = mx.bfloat16
) -> None:
    """Writes the folder whole or not at all; weights in `dtype`.

    Raises:
        MTPError: it cannot be written.
    """
    with new_folder(Path(folder)) as temporary:
        put_adapter(temporary, adapter, info, dtype)
        (temporary / "README.md").write_text(model_card(info, adapter), encoding="utf-8")


def put_adapter(folder: Path, adapter: MaskAdapter, info: AdapterInfo, dtype: mx.Dtype) -> None:
    """Puts config and weights into a folder that is being made; a model's own folder can hold them too."""
    tensors = {
        name: value if value.dtype == mx.int32 else value.astype(dtype)
        for name, value in adapter.tensors().items()
    }
    mx.save_safetensors(str(folder / WEIGHTS_NAME), tensors, metadata={"format": "mlx"})
    (folder / CONFIG_NAME).write_text(json.dumps(info.to_json(), indent=2) + "\n", encoding="utf-8")


def read_info(folder: Path) -> AdapterInfo:
    """Reads `mtp_config.json`.

    Raises:
        MTPError: no adapter there, or its config is damaged or of another method or version.
    """
    path, raw = Path(folder) / CONFIG_NAME, read_config(folder)
    if raw.get("format") != FORMAT_VERSION or raw.get("method") != METHOD:
        raise MTPError(
            f"{path}: format {raw.get('format')!r}, method {raw.get('method')!r}; this version reads format "
            f"{FORMAT_VERSION}, method '{METHOD}'"
        )
    try:
        shape = dict(raw["adapter"])
        shape["target_modules"] = tuple(shape.get("target_modules", ()))
        return AdapterInfo(
            base_name=raw["base"]["name"],
            base_fingerprint=raw["base"]["fingerprint"],
            shape=MaskAdapterConfig(**shape),
            training=raw.get("training", {}),
            acceptance=list(raw.get("acceptance", [])),
            measurements=raw.get("measurements", {}),
            mask=raw.get("mask", {}),
        )
    except (KeyError, TypeError) as error:
        raise MTPError(f"{path} is damaged: {error}") from error


def load_adapter(folder: Path, model: nn.Module) -> tuple[MaskAdapter, AdapterInfo]:
    """Reads an adapter for `model` (not yet attached).

    Raises:
        MTPError: not an adapter, trained for another base (both fingerprints shown), or damaged weights.
    """
    info = read_info(folder)
    check_base(folder, info.base_name, info.base_fingerprint, model)
    tensors = read_tensors(folder)
    adapter = new_adapter(model, info.shape, tensors.get("draft_ids"))
    adapter.load_tensors(tensors)
    return adapter, info


def _method(shape: MaskAdapterConfig) -> str:
    if shape.shared_mask:
        return "A single mask token (arXiv 2602.06019) with gated LoRA (arXiv 2507.11851)"
    return "Gated-LoRA mask tokens (arXiv 2507.11851)"


def model_card(info: AdapterInfo, adapter: MaskAdapter) -> str:
    """The folder's README: base, method, data, measured acceptance, how to use it."""
    count = sum(value.size for name, value in adapter.tensors().items() if name != "draft_ids")
    depth = " / ".join(f"{value:.2f}" for value in info.acceptance) or "not measured"
    lines = [
        f"# Mask-token adapter for {info.base_name}",
        "",
        f"{_method(info.shape)}, trained and run by mtp-mlx. The base model's own output is",
        "unchanged: drafts are verified, and the adapter acts on slot rows only.",
        "",
        f"- base: {info.base_name}, fingerprint `{info.base_fingerprint}`",
        f"- slots {info.shape.slots}, rank {info.shape.rank}, alpha {info.shape.alpha:g}, "
        f"draft vocabulary {info.shape.draft_vocab_size or 'whole'}; {count / 1e6:.2f} M weights",
        f"- acceptance per depth on held-out text: {depth}",
        "",
        "## Training",
        "",
        *[f"- {key}: {value}" for key, value in info.training.items()],
        "",
    ]
    for name, report in info.measurements.items():
        lines += [f"## {name}", "", "```json", json.dumps(report, indent=2), "```", ""]
    lines += [
        "## Use",
        "",
        "```",
        f"mtp-mlx generate --model {info.base_name} --adapter . --prompt ...",
        "```",
        "",
    ]
    return "\n".join(lines)
