"""The adapter folder of Parallel Token Prediction: `mtp_config.json` with method "ptp", `mtp.safetensors`, a README.

As the folder of mask tokens, with the variant, the embedding of uniforms and the sampling of
the teacher, on which uniforms are conditional.
"""

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
from mtp_mlx.drafters.ptp.config import PTPConfig, TeacherSampling
from mtp_mlx.drafters.ptp.weights import PTPAdapter, new_ptp_adapter
from mtp_mlx.errors import MTPError
from mtp_mlx.files import new_folder

METHOD = "ptp"


@dataclass
class PTPInfo:
    """What a PTP folder says about itself, apart from weights.

    Attributes:
        base_name: the base model as the user named it.
        base_fingerprint: see `mtp_mlx.model.fingerprint.base_fingerprint`.
        shape: the adapter's shape, its teacher's sampling included.
        source: where converted weights come from; empty if trained here.
        training: provenance.
        acceptance: measured acceptance per depth on held-out text.
        measurements: named reports, free-form.
    """

    base_name: str
    base_fingerprint: str
    shape: PTPConfig
    source: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    acceptance: list[float] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of `mtp_config.json`."""
        return {
            "format": FORMAT_VERSION,
            "method": METHOD,
            "base": {"name": self.base_name, "fingerprint": self.base_fingerprint},
            "adapter": dataclasses.asdict(self.shape),
            "source": self.source,
            "training": self.training,
            "acceptance": self.acceptance,
            "measurements": self.measurements,
        }


def is_ptp(folder: Path) -> bool:
    """Whether an adapter folder is one of PTP.

    Raises:
        MTPError: no adapter there.
    """
    return read_config(folder).get("method") == METHOD


def read_ptp_info(folder: Path) -> PTPInfo:
    """Reads `mtp_config.json`.

    Raises:
        MTPError: no PTP adapter there, or its config is damaged or of another version.
    """
    path, raw = Path(folder) / CONFIG_NAME, read_config(folder)
    if raw.get("format") != FORMAT_VERSION or raw.get("method") != METHOD:
        raise MTPError(
            f"{path}: format {raw.get('format')!r}, method {raw.get('method')!r}; adapters of Parallel Token "
            f"Prediction are format {FORMAT_VERSION}, method '{METHOD}'"
        )
    try:
        shape = dict(raw["adapter"])
        shape["target_modules"] = tuple(shape.get("target_modules", ()))
        shape["teacher"] = TeacherSampling(**shape["teacher"])
        return PTPInfo(
            base_name=raw["base"]["name"],
            base_fingerprint=raw["base"]["fingerprint"],
            shape=PTPConfig(**shape),
            source=dict(raw.get("source", {})),
            training=dict(raw.get("training", {})),
            acceptance=list(raw.get("acceptance", [])),
            measurements=dict(raw.get("measurements", {})),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MTPError(f"{path} is damaged: {error}") from error


def load_ptp(folder: Path, model: nn.Module) -> tuple[PTPAdapter, PTPInfo]:
    """Reads a PTP adapter for `model` (not yet attached).

    Raises:
        MTPError: not a PTP adapter, made for another base (both fingerprints shown), or damaged weights.
    """
    info = read_ptp_info(folder)
    check_base(folder, info.base_name, info.base_fingerprint, model)
    tensors = read_tensors(folder)
    adapter = new_ptp_adapter(model, info.shape, tensors.get("draft_ids"))
    adapter.load_tensors(tensors)
    return adapter, info


def save_ptp(folder: Path, adapter: PTPAdapter, info: PTPInfo, dtype: mx.Dtype = mx.bfloat16) -> None:
    """Writes the folder whole or not at all; weights in `dtype`.

    Raises:
        MTPError: it cannot be written.
    """
    tensors = {
        name: value if value.dtype == mx.int32 else value.astype(dtype)
        for name, value in adapter.tensors().items()
    }
    with new_folder(Path(folder)) as temporary:
        mx.save_safetensors(str(temporary / WEIGHTS_NAME), tensors, metadata={"format": "mlx"})
        (temporary / CONFIG_NAME).write_text(json.dumps(info.to_json(), indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_card(info, tensors), encoding="utf-8")


def _card(info: PTPInfo, tensors: dict[str, mx.array]) -> str:
    """The folder's README: base, variant, teacher, how it was trained, measured acceptance, how to use it."""
    shape = info.shape
    weights = sum(value.size for name, value in tensors.items() if name != "draft_ids")
    depths = " / ".join(f"{value:.2f}" for value in info.acceptance) or "not measured"
    kind = {"o": "O-PTP, one-hot", "c": "C-PTP, categorical"}[shape.variant]
    sampling = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(shape.teacher).items())
    provenance = {**info.source, **info.training}
    lines = [
        f"# Parallel Token Prediction adapter for {info.base_name}",
        "",
        "Slots that carry the uniforms of inverse-CDF picks (arXiv 2512.21323), run by mtp-mlx. The base model's own",
        "output is unchanged: drafts are verified, and the adapter acts on slot rows only.",
        "",
        f"- base: {info.base_name}, fingerprint `{info.base_fingerprint}`",
        f"- {kind}; uniforms embedded as {shape.embedding}"
        + ("; slots carry nothing (control)" * shape.independent),
        f"- slots {shape.slots}, rank {shape.rank}, alpha {shape.alpha:g}, draft vocabulary "
        f"{shape.draft_vocab_size or 'whole'}; {weights / 1e6:.2f} M weights",
        f"- sampling of its teacher: {sampling}; with another sampling fewer drafts are accepted",
        f"- acceptance per depth on held-out text: {depths}",
        "",
        "## Training",
        "",
        *[f"- {key}: {value}" for key, value in provenance.items()],
        "",
        "## Use",
        "",
        "```",
        f"mtp-mlx generate --model {info.base_name} --adapter . --temp {shape.teacher.temperature:g} --prompt ...",
        "```",
        "",
    ]
    return "\n".join(lines)
