"""SOURCE as a local path: a path stays as it is, a hub id is downloaded by huggingface_hub into its cache."""

from __future__ import annotations

import re
from pathlib import Path

from mtp_mlx.errors import ConversionError

from .checkpoint import TORCH_SUFFIXES

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BESIDE = ["*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
_TORCH = [f"*{suffix}" for suffix in TORCH_SUFFIXES]


def is_hub_id(source: str) -> bool:
    """Whether `source` names a repository of the hub: owner/name, and nothing of that name is here."""
    return _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def local_source(source: str) -> Path:
    """The file or folder of `source`. PyTorch files of a repository are fetched only where it has no safetensors.

    Raises ConversionError: the download failed.
    """
    if not is_hub_id(source):
        return Path(source).expanduser()
    import huggingface_hub

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
        except (OSError, ValueError, RuntimeError) as error:  # its errors are subclasses of these
            reason = " ".join(str(error).split())[:300]
            raise ConversionError(
                f"{source}: neither a file or folder here, nor could it be had from the hub "
                f"({type(error).__name__}: {reason}); check the name, or download it and give the folder"
            ) from error

    folder = fetch([*_BESIDE, "*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        folder = fetch([*_BESIDE, *_TORCH])
    return folder
