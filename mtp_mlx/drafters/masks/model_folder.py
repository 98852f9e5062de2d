"""Models with a mask token of their own: fine-tuned as a whole to answer several masks at once (arXiv 2602.06019).

Such a model is an mlx-lm model folder whose sidecar `MODEL/mtp` is an adapter with nothing but the mask's embedding.
`mtp_mlx.load(folder)` finds both; mlx-lm itself loads the model and ignores the rest.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import save_model

from mtp_mlx.drafters.masks.folder import AdapterInfo, put_adapter
from mtp_mlx.drafters.masks.weights import MaskAdapter, MaskAdapterConfig, new_adapter
from mtp_mlx.files import new_folder
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.sidecar import FOLDER

WEIGHTS_AND_CODE = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".py")


def mask_only(slots: int) -> MaskAdapterConfig:
    """The shape of an adapter that is a mask token and nothing else."""
    return MaskAdapterConfig(slots=slots, rank=0, alpha=0.0, sampler_width=0, shared_mask=True)


@dataclass(frozen=True)
class MaskSidecar:
    """What a sidecar will hold; made while the model's weights are still there.

    Attributes:
        adapter: the mask's embedding.
        info: what the sidecar says.
    """

    adapter: MaskAdapter
    info: AdapterInfo

    @staticmethod
    def of(model: nn.Module, mask: mx.array, info: AdapterInfo) -> MaskSidecar:
        """The sidecar of a bare mlx-lm model.

        Args:
            model: as it will be in the folder: cast, quantised.
            mask: [D] the mask token's embedding.
            info: its fingerprint is set here.
        """
        adapter = new_adapter(model, info.shape)
        adapter.load_tensors({"slot_embeddings.weight": mask[None]})
        mx.eval(adapter.parameters())
        return MaskSidecar(adapter, replace(info, base_fingerprint=base_fingerprint(model)))

    def put_into(self, folder: Path) -> None:
        """Puts the sidecar into a model folder that is being made."""
        inside = folder / FOLDER
        inside.mkdir()
        put_adapter(inside, self.adapter, self.info, mx.float32)
        (inside / "README.md").write_text(_card(self.info), encoding="utf-8")


def write_model_folder(out: Path, source: Path, model: nn.Module, mask: mx.array, info: AdapterInfo) -> None:
    """Writes a model folder with its sidecar, whole or not at all; what is at `out` is replaced.

    Args:
        source: the model folder whose configuration and tokenizer are taken over; code in it is not.
        model: bare mlx-lm model, whose weights are written as they are.
        mask, info: see `MaskSidecar.of`.

    Raises:
        MTPError: it cannot be written.
    """
    with new_folder(out) as temporary:
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.endswith(WEIGHTS_AND_CODE):
                shutil.copyfile(file, temporary / file.name)
        save_model(temporary, model)
        MaskSidecar.of(model, mask, info).put_into(temporary)


def _card(info: AdapterInfo) -> str:
    """The sidecar's README."""
    lines = [
        f"# The mask token of {info.base_name}",
        "",
        "A single mask token (arXiv 2602.06019). The model in the folder above was fine-tuned as a whole, so",
        "verified decoding gives the text of that model, not of the one it was made from. Unverified emission is",
        "lossy.",
        "",
        f"- model: {info.base_name}, fingerprint `{info.base_fingerprint}`",
        f"- at most {info.shape.slots} masks, {info.shape.slots + 1} tokens a pass",
        *[f"- {key}: {value}" for key, value in {**info.mask, **info.training}.items()],
        "",
        "## Use",
        "",
        "```",
        "mtp-mlx generate --model MODEL --prompt ...                                verified: this model's own text",
        "mtp-mlx generate --model MODEL --emit conf-adapt --tau 0.9 --prompt ...    as published: lossy",
        "```",
        "",
    ]
    return "\n".join(lines)
