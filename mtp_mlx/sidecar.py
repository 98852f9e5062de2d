"""The adapter folder that lies inside a model folder: `MODEL/mtp`, written by `mtp-mlx convert` for MTP heads."""

from __future__ import annotations

from pathlib import Path

FOLDER = "mtp"
_MARK = "mtp_config.json"  # as in `mtp_mlx.adapter_folder`, whose import needs mlx


def sidecar(model: str | Path) -> Path | None:
    """The adapter folder inside the model folder `model`, or None; a hub id has none."""
    folder = Path(model) / FOLDER
    return folder if (folder / _MARK).is_file() else None
