"""Models with a mask token of their own: fine-tuned as a whole to answer several masks at once (arXiv 2602.06019).

Such a model is an mlx-lm model folder with an adapter folder inside, `MODEL/mtp`, that has nothing but the mask's
embedding. `mtp_mlx.load(folder)` finds both; mlx-lm itself loads the model and ignores the rest.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import save_model

from mtp_mlx.adapter_folder import SIDECAR, CardLines, Header, paper, put_adapter
from mtp_mlx.drafters.masks.folder import card_lines, config_of
from mtp_mlx.drafters.masks.weights import MaskAdapter, MaskAdapterConfig, new_adapter
from mtp_mlx.files import new_folder
from mtp_mlx.model.fingerprint import base_fingerprint, sample_base

WEIGHTS_AND_CODE = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".py")


def mask_only(slots: int) -> MaskAdapterConfig:
    """The shape of an adapter that is a mask token and nothing else."""
    return MaskAdapterConfig(slots=slots, rank=0, alpha=0.0, sampler_width=0, shared_mask=True)


@dataclass(frozen=True)
class MaskSidecar:
    """The adapter folder of a mask token, ready to be written; made while the model's weights are still there.

    Attributes:
        adapter: the mask's embedding.
        header: what the folder says.
    """

    adapter: MaskAdapter
    header: Header

    @staticmethod
    def of(model: nn.Module, mask: mx.array, header: Header) -> MaskSidecar:
        """The adapter folder of a bare mlx-lm model.

        Args:
            model: as it will be in the folder: cast, quantised.
            mask: [D] the mask token's embedding.
            header: its fingerprint and its sample of the base are set here.
        """
        adapter = new_adapter(model, config_of(Path(SIDECAR), header))
        adapter.load_tensors({"slot_embeddings.weight": mask[None]})
        mx.eval(adapter.parameters())
        fingerprint, sample = base_fingerprint(model), sample_base(model)
        return MaskSidecar(adapter, replace(header, base_fingerprint=fingerprint, base_sample=sample))

    def put_into(self, folder: Path) -> None:
        """Puts it into a model folder that is being made."""
        inside = folder / SIDECAR
        inside.mkdir()
        put_adapter(inside, self.header, self.adapter.tensors(), _card_lines(inside, self.header), mx.float32)


def write_model_folder(out: Path, source: Path, model: nn.Module, mask: mx.array, header: Header) -> None:
    """Writes a model folder with its mask token, whole or not at all; what is at `out` is replaced.

    Args:
        source: the model folder whose configuration and tokenizer are taken over; code in it is not.
        model: bare mlx-lm model, whose weights are written as they are.
        mask, header: see `MaskSidecar.of`.

    Raises:
        MTPError: if it cannot be written.
    """
    with new_folder(out) as temporary:
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.endswith(WEIGHTS_AND_CODE):
                shutil.copyfile(file, temporary / file.name)
        save_model(temporary, model)
        MaskSidecar.of(model, mask, header).put_into(temporary)


def _card_lines(folder: Path, header: Header) -> CardLines:
    """The lines of the model card of a mask token that belongs to its model."""
    slots = config_of(folder, header).slots
    return replace(
        card_lines(folder, header),
        title=f"The mask token of {header.base_name}",
        about=(
            "The model in the folder above was fine-tuned as a whole, so verified decoding gives the text of that "
            "model,\nnot of the one it was made from. Unverified emission is lossy."
        ),
        method=paper("a single mask token by online self-distillation", "2602.06019"),
        facts=(f"at most {slots} masks, {slots + 1} tokens a pass",),
        commands=(
            "mtp-mlx generate --model MODEL --prompt ...                                verified",
            "mtp-mlx generate --model MODEL --emit conf-adapt --tau 0.9 --prompt ...    as published, lossy",
        ),
    )
