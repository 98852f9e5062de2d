"""Model folders with a mask token of their own: an mlx-lm model that was fine-tuned to be asked by it.

Such a folder is an mlx-lm model folder with `mtp_config.json` and `mtp.safetensors` in it, an adapter with nothing
but the mask's embedding. `mtp_mlx.load(folder)` finds both; mlx-lm itself loads the model and ignores the rest.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import save_model

from mtp_mlx.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterInfo, base_fingerprint, put_adapter
from mtp_mlx.errors import MTPError
from mtp_mlx.files import new_folder
from mtp_mlx.model.attach import new_adapter
from mtp_mlx.model.mask_adapter import MaskAdapterConfig

CODE_AND_WEIGHTS = (".py", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")


def mask_only(slots: int) -> MaskAdapterConfig:
    """The shape of an adapter that is a mask token and nothing else."""
    return MaskAdapterConfig(slots=slots, rank=0, alpha=0.0, sampler_width=0, shared_mask=True)


def write_model_folder(
    out: Path, source: Path, model: nn.Module, mask: mx.array, info: AdapterInfo, force: bool = False
) -> Path:
    """Writes the folder whole or not at all.

    Args:
        out: the folder.
        source: the model folder whose config and tokenizer are taken over; code in it is not.
        model: bare mlx-lm model, whose weights are written as they are.
        mask: [D] the mask token's embedding.
        info: what the adapter says; its fingerprint and base name are set here.
        force: replace `out` if it is such a folder already.

    Raises:
        MTPError: `out` is there and not to be replaced, or cannot be written.
    """
    check_out(out, force)
    info.base_fingerprint, info.base_name = base_fingerprint(model), out.name
    adapter = new_adapter(model, info.shape)
    adapter.load_tensors({"slot_embeddings.weight": mask[None]})
    with new_folder(out) as temporary:
        for file in sorted(source.iterdir()):
            if file.is_file() and not _left_out(file.name):
                shutil.copyfile(file, temporary / file.name)
        save_model(temporary, model)
        put_adapter(temporary, adapter, info, mx.float32)
        (temporary / "README.md").write_text(_card(info), encoding="utf-8")
    return out


def check_out(out: Path, force: bool) -> None:
    """Raises MTPError where `out` is there and not a folder that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / CONFIG_NAME).is_file():
        raise MTPError(f"{out} exists and is no model folder with a mask token: give another place")
    if not force:
        raise MTPError(f"{out} exists: give --force to replace it, or another place")


def _left_out(name: str) -> bool:
    return name.endswith(CODE_AND_WEIGHTS) or name in (CONFIG_NAME, WEIGHTS_NAME, "README.md")


def _card(info: AdapterInfo) -> str:
    """The folder's README."""
    lines = [
        f"# {info.base_name}",
        "",
        "An mlx-lm model folder with a mask token (arXiv 2602.06019). The model itself was fine-tuned, so verified",
        "decoding gives the text of this model, not of the one it was made from. Unverified emission is lossy.",
        "",
        *[f"- {key}: {value}" for key, value in {**info.mask, **info.training}.items()],
        "",
        "## Use",
        "",
        "```",
        "mtp-mlx generate --model . --prompt ...                                  verified: this model's own text",
        "mtp-mlx generate --model . --emit conf-adapt --tau 0.9 --prompt ...      as published: lossy",
        "```",
        "",
    ]
    return "\n".join(lines)
