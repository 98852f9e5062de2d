"""From what a user names to an adapter folder: a folder, a name of the package, a hub id, or heads that others made.

Heads of others (`heads`) are converted and measured once for each model, in `heads/` of the cache, and found there by
later runs without a network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_mlx import hub
from mtp_mlx.adapter_folder import CONFIG_NAME, Header, sidecar
from mtp_mlx.chat_template import chat_ids
from mtp_mlx.drafters import registry
from mtp_mlx.errors import MTPError
from mtp_mlx.files import cache_dir, locked, new_folder, user_path
from mtp_mlx.model.fingerprint import fingerprint_of, sampled_through
from mtp_mlx.model_faults import read_config
from mtp_mlx.models import bundled_adapter, named_adapter

log = logging.getLogger("mtp_mlx")
# Part of the folder's name: raise it when the converter's output changes, so that old conversions are not used.
_VERSION = 1
_PROMPTS = 4  # that heads are measured on
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def load_adapter(folder: Path, base: Any, again: Callable[[], tuple[Any, Any]] | None) -> tuple[Any, Header]:
    """The adapter in `folder` and its header, for a bare model; `again` loads the model once more if it is lazy.

    Raises:
        MTPError: as `registry.load_folder`.
    """
    if again is None:
        return registry.load_folder(folder, base)
    with sampled_through(base, lambda: again()[0]):
        return registry.load_folder(folder, base)


def adapter_folder(model: str, path: str | Path, adapter: str | Path) -> Path | None:
    """The folder that `adapter` of `load` stands for, or None, for a model at `path`.

    Raises:
        MTPError: a hub id whose repository cannot be fetched, or holds no adapter.
    """
    if adapter == "auto":
        return bundled_adapter(model) or sidecar(path)
    folder = named_adapter(adapter)
    if isinstance(adapter, str) and not folder.exists() and hub.is_repository(adapter):
        return hub.fetch_adapter(adapter)
    return folder


@dataclass(frozen=True)
class Wanted:
    """Heads for a model.

    Attributes:
        source: hub id, folder or file.
        name: the model's name, as `load` was given it.
        folder: its folder.
        model: the bare model. tokenizer: its tokenizer.
        alone: whether this is the only process of a run.
    """

    source: str
    name: str
    folder: Path
    model: Any
    tokenizer: Any
    alone: bool = True


def drafter_folder(
    model: str, path: str | Path, adapter: str | Path | None, heads: Wanted | None
) -> Path | None:
    """The adapter folder for a model at `path` that `adapter` and `heads` of `load` stand for, or None.

    Raises:
        MTPError: both are named, or as `adapter_folder` and `heads_folder`.
    """
    if heads is None:
        return None if adapter is None else adapter_folder(model, path, adapter)
    if adapter not in ("auto", None):
        raise MTPError("one drafter at a time: leave `adapter` or `heads` out")
    return heads_folder(heads)


def heads_folder(wanted: Wanted, tell: Callable[[str], None] = log.warning) -> Path:
    """The adapter folder of the heads that `heads` of `load` names, converted on first use.

    Args:
        tell: told what is fetched, and what was measured.

    Raises:
        MTPError: no such source, no heads in it, or heads that do not fit the model.
    """
    path = user_path(wanted.source)
    if (path / CONFIG_NAME).is_file():
        return path
    if path.is_dir() and (beside := sidecar(path)) is not None:
        return beside
    if not path.exists() and not hub.is_repository(wanted.source):
        raise MTPError(
            f"`heads` {wanted.source} is neither a folder nor a file nor a hub id (OWNER/NAME): give MTP heads"
        )
    kept = cache_dir() / "heads" / _kept_name(wanted, path)
    if not (kept / CONFIG_NAME).is_file():
        if not wanted.alone:
            raise MTPError(
                f"the heads of {wanted.source} must be taken over by a single process first: run it once without "
                "mlx.launch"
            )
        with locked(kept):
            if not (kept / CONFIG_NAME).is_file():  # another process may have been faster
                return _take(wanted, path, kept, tell)
    return kept


def _take(wanted: Wanted, path: Path, kept: Path, tell: Callable[[str], None]) -> Path:
    """Converts the heads of a source into the folder `kept`."""
    from mtp_mlx.convert.heads.on_hub import fetch_heads
    from mtp_mlx.convert.heads.take import Target, take_heads
    from mtp_mlx.convert.heads.verify import PROMPTS
    from mtp_mlx.convert.read.checkpoint import open_checkpoint

    found = open_checkpoint(path) if path.exists() else fetch_heads(wanted.source, tell)
    if isinstance(found, Path):  # an adapter of ours: no conversion, but found without a network next time
        with new_folder(kept) as folder:
            for name in hub.FILES:
                if (found / name).is_file():
                    shutil.copyfile(found / name, folder / name)
        return kept
    prompts = [_prompt(wanted.tokenizer, text) for text in PROMPTS[:_PROMPTS]]
    name = Path(wanted.name).name if Path(wanted.name).exists() else wanted.name
    target = Target(name, read_config(wanted.folder), wanted.model, wanted.tokenizer, prompts)
    with new_folder(kept) as folder:
        take_heads(found, folder, target, tell)
    return kept


def _prompt(tokenizer: Any, text: str) -> list[int]:
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(text))
    return chat_ids(tokenizer, [{"role": "user", "content": text}])


def _kept_name(wanted: Wanted, path: Path) -> str:
    """The folder's name in the cache: other weights in the source, or another model, make it another one."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    stats = [(str(file), file.stat()) for file in files if file.suffix in _WEIGHTS]
    key = {
        "source": str(path.resolve()) if path.exists() else wanted.source,
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "model": fingerprint_of(wanted.model)[0] or wanted.name,
        "version": _VERSION,
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', wanted.source).strip('-.')[-60:]}-{digest}"


def unconverted_heads(path: str | Path) -> str | None:
    """The family of MTP heads that lie in a model folder as they are, so that `heads` could name it; else None."""
    from mtp_mlx.convert.heads.plan import heads_beside_trunk
    from mtp_mlx.convert.read.checkpoint import open_checkpoint

    try:
        found = heads_beside_trunk(open_checkpoint(path), wanted=False) if Path(path).is_dir() else None
    except (MTPError, OSError):
        return None
    return None if found is None or found.convention.kind == "lora" else found.title
