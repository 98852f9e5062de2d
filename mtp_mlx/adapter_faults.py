"""What a folder is that was named as an adapter and is none, and what to do with it, as the end of a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def not_an_adapter(folder: Path, config_name: str) -> str:
    """Why `folder`, which has no file `config_name`, is not an adapter folder of mtp-mlx."""
    if not folder.exists():
        fetch = f"; get it with `mtp-mlx pull {folder} --out OUT`" if _is_hub_id(str(folder)) else ""
        return f"{folder} is not an adapter folder: there is no such folder{fetch}"
    lora = _object(folder / "adapter_config.json")
    if lora is not None and "peft_type" in lora:
        return (
            f"{folder} is a PEFT adapter, which changes the model's text instead of drafting: merge it into its "
            "model, or, if it was trained on mask tokens, use `mtp-mlx convert --heads-only --base MODEL`"
        )
    if lora is not None:
        return (
            f"{folder} is a LoRA adapter of mlx-lm, which changes the model's text instead of drafting: fuse it into "
            f"the model with `mlx_lm.fuse --model MODEL --adapter-path {folder}`, and use the fused model"
        )
    if (folder / "config.json").is_file():
        return f"{folder} is a model folder, not an adapter folder: name it with `model` or `draft_model`"
    return f"{folder} is not an adapter folder: it has no {config_name}"


def _object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file, {} if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
