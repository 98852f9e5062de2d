"""`mtp-mlx info`: show what this machine, a model folder or an adapter folder is. No weights are loaded whole."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

import click

from mtp_mlx.adapter_folder import CONFIG_NAME, words
from mtp_mlx.errors import MTPError

EPILOG = """\b
Examples:
  mtp-mlx info
  mtp-mlx info ./model
  mtp-mlx info ./adapter --json
"""
PACKAGES = ("mtp-mlx", "mlx", "mlx-lm", "numpy", "transformers")


@click.command(epilog=EPILOG, short_help="Show what a model, an adapter and this machine are")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object")
def command(path: Path | None, as_json: bool) -> None:
    """Show what the model, adapter or checkpoint at PATH is; without PATH, what this machine has.

    PATH may be a hub id: then no weights are fetched, and shown is which of the repository's files hold MTP heads.
    """
    facts = machine() if path is None else folder(path.expanduser())
    click.echo(json.dumps(facts) if as_json else "\n".join(lines(facts)))


# --- this machine -------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Versions, device, BLAS, caches and the embedded model."""
    import mlx.core as mx

    from mtp_mlx.files import kept_file
    from mtp_mlx.measure.plain_speed import device_name
    from mtp_mlx.models import EMBEDDED, bundled_adapter

    cache = kept_file()
    return {
        "kind": "machine",
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(),
        "metal": mx.metal.is_available(),
        "blas": _blas(),
        "cache": {
            "folder": str(cache or "none: there is no home folder"),
            "size": _size(cache) if cache else 0,
        },
        "embedded models": {
            name: {
                "converted": _converted(cache, name) or "not yet: converted on first use",
                "adapter": _bundled(bundled_adapter(name)),
            }
            for name in EMBEDDED
        },
    }


def _converted(cache: Path | None, name: str) -> list[str]:
    """Names of the folders in the cache that hold an embedded model, in every precision."""
    folders = [] if cache is None else (cache / "models").glob(f"{name}-*")
    return sorted(found.name for found in folders if (found / "config.json").is_file())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _blas() -> str:
    if sys.platform == "darwin":
        return "Accelerate"
    try:
        loaded = "openblas" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    threads = os.environ.get("OPENBLAS_NUM_THREADS", f"{os.cpu_count()}")
    return f"OpenBLAS, {threads} threads" if loaded else "the one in MLX's wheel, which is slow"


def _bundled(adapter: Path | None) -> str:
    return "none in this package" if adapter is None else str(adapter)


# --- a folder -----------------------------------------------------------------------------------------------


def folder(path: Path) -> dict[str, Any]:
    """Facts about an adapter folder, a model folder, a checkpoint (a file, or a folder of another layout) or a
    repository on the hub.

    Raises:
        MTPError: if `path` is none of these.
    """
    from mtp_mlx.adapter_faults import not_an_adapter
    from mtp_mlx.convert.heads.on_hub import describe_repository
    from mtp_mlx.hub import is_repository
    from mtp_mlx.model_faults import holds_heads_alone, read_config
    from mtp_mlx.models import EMBEDDED, embedded_model, named_adapter

    path = named_adapter(path)
    if str(path) in EMBEDDED and not path.exists():
        return model_folder(embedded_model(str(path)))
    if not path.exists() and is_repository(str(path)):
        return describe_repository(str(path))
    if not path.exists():
        raise MTPError(f"{path} does not exist")
    if path.is_file():
        return checkpoint(path)
    if (path / CONFIG_NAME).is_file():
        return adapter(path)
    if (path / "config.json").is_file():
        alone = holds_heads_alone(read_config(path).get("model_type"))
        return checkpoint(path) if alone else model_folder(path) | checkpoint_heads(path)
    found = checkpoint_or_none(path)
    if found is None and (path / "adapter_config.json").is_file():
        raise MTPError(not_an_adapter(path, CONFIG_NAME))
    if found is None:
        raise MTPError(
            f"{path} is neither a model folder (config.json) nor an adapter folder ({CONFIG_NAME})"
        )
    return found


# --- checkpoints --------------------------------------------------------------------------------------------


def checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, its MTP heads included; no weights are read.

    Raises:
        MTPError: if it is not a checkpoint, or a damaged one.
    """
    from mtp_mlx.convert.heads.report import describe
    from mtp_mlx.convert.read.checkpoint import open_checkpoint

    if path.suffix.lower() == ".gguf":
        return _gguf(path)
    return describe(open_checkpoint(path))


def _gguf(path: Path) -> dict[str, Any]:
    from mtp_mlx.convert.gguf.parts import read_gguf

    header = read_gguf(path)
    kinds = [info.type_name for info in header.tensors.values()]
    return {
        "kind": "checkpoint",
        "path": str(path),
        "container": "gguf",
        "type": header.metadata.get("general.architecture", "?"),
        "tensors": len(kinds),
        **({"files": len(header.files)} if len(header.files) > 1 else {}),
        "size": sum(file.stat().st_size for file in header.files),
        "types": ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))),
        "mtp heads": "none are read from a .gguf file",
    }


def checkpoint_or_none(path: Path) -> dict[str, Any] | None:
    """What the checkpoint in a folder without config.json holds, or None where the folder has no weights."""
    from mtp_mlx.convert.read.checkpoint import SUFFIXES

    has_weights = any(file.suffix in SUFFIXES for file in path.iterdir()) if path.is_dir() else False
    return checkpoint(path) if has_weights else None


def checkpoint_heads(path: Path) -> dict[str, Any]:
    """The MTP heads inside a model folder: its adapter folder, or heads among its tensors; empty if it has none."""
    from mtp_mlx.adapter_folder import sidecar
    from mtp_mlx.convert.heads.report import describe_heads
    from mtp_mlx.convert.read.checkpoint import open_checkpoint

    beside = sidecar(path)
    if beside is not None:
        return {"adapter beside it": {"folder": str(beside), **folder(beside)}}

    try:
        heads = describe_heads(open_checkpoint(path))
    except MTPError as error:
        heads = f"not known: {error}"
    return {} if heads == "none" else {"mtp heads": heads}


def adapter(path: Path) -> dict[str, Any]:
    """What an adapter folder says about itself; its base model is not needed.

    Raises:
        MTPError: if its method is not known, or a file is missing or damaged.
    """
    from mtp_mlx.adapter_folder import count_weights, read_header, read_tensors, tensor_sizes
    from mtp_mlx.drafters.registry import folder_facts

    header = read_header(path)
    return {
        "kind": "adapter",
        "method": header.method,
        "size": _size(path),
        "weights": count_weights(tensor_sizes(read_tensors(path, lazy=True))),
        "base": {
            "name": header.base_name,
            "fingerprint": header.base_fingerprint or "not known",
            "sampled weights": "not known" if header.base_sample is None else header.base_sample.form,
            **(
                {"recurrent state": "yes, so slots in the linear layout only"}
                if header.base_recurrent
                else {}
            ),
        },
        **folder_facts(path, header),
        **({"mask": header.mask} if header.mask else {}),
        **({"source": header.source} if header.source else {}),
        "acceptance": header.acceptance or "not measured",
        **(
            {"acceptance by precision": by_precision}
            if (by_precision := header.acceptance_by_precision)
            else {}
        ),
        "training": header.training or "not recorded",
        "measurements": header.measurements or "none",
    }


def model_folder(path: Path) -> dict[str, Any]:
    """A model's shape, whether it can be drafted for, and the fingerprint that its adapters name."""
    from mtp_mlx.model_faults import read_config

    config = read_config(path)
    facts: dict[str, Any] = {
        "kind": "model",
        "path": str(path),
        "type": config.get("model_type", "?"),
        "size": _size(path),
        "layers": config.get("num_hidden_layers"),
        "hidden size": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
        "dtype": config.get("torch_dtype") or config.get("dtype"),
        "quantisation": config.get("quantization") or "none",
    }
    return {key: value for key, value in facts.items() if value is not None} | _seams(path)


def _seams(path: Path) -> dict[str, Any]:
    """Whether the model has the seams that drafting needs; of the weights only the fingerprint's are read."""
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache

    from mtp_mlx.base_model import read_model, read_tokenizer
    from mtp_mlx.model.attach import attach
    from mtp_mlx.model.branches import why_never
    from mtp_mlx.model.fingerprint import base_fingerprint
    from mtp_mlx.model.seams import cache_leaves, check_caches, find_seams, is_recurrent

    try:
        model, config = read_model(path, "no", lazy=True)
        read_tokenizer(path, "no", config)
    except MTPError as error:
        return {"usable": str(error)}
    weights = dict(tree_flatten(model.parameters()))
    facts: dict[str, Any] = {"tensors": len(weights)}
    try:
        seams, caches = find_seams(model), make_prompt_cache(model)
        check_caches(caches, str(getattr(model, "model_type", "?")))
        attached = attach(model)
        reason = why_never(attached)
        attached.detach()
    except MTPError as error:
        return {**facts, "usable": f"no: {error}"}
    return {
        **facts,
        "usable": "yes, with slots in the linear layout only" if is_recurrent(caches) else "yes",
        "draft trees": f"no: {reason}" if reason else "yes",
        "seams": {
            "embed_tokens": 1,
            "linear": len(seams.linears),
            "rope": len(seams.ropes),
            "cache": ", ".join(sorted({type(leaf).__name__ for _, leaf in cache_leaves(caches)})),
        },
        "fingerprint": base_fingerprint(model),
    }


# --- showing ------------------------------------------------------------------------------------------------


def _size(path: Path) -> int:
    """Bytes of a folder's files."""
    if not path.is_dir():
        return 0
    return sum(found.stat().st_size for found in path.rglob("*") if found.is_file())


def lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """`key: value` lines, nested mappings indented."""
    shown = []
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            shown += [f"{indent}{key}:", *lines(value, indent + "  ")]
        else:
            shown.append(f"{indent}{key}: {_readable(key, value)}")
    return shown


def _readable(key: str, value: Any) -> str:
    if key == "size" and isinstance(value, int):
        return _bytes(value)
    if key == "weights" and isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        return " / ".join(f"{item:.2f}" for item in value)
    if key == "target_modules" and not value:
        return "every linear layer"
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value)) or "none"
    return words(value)


def _bytes(count: int) -> str:
    power = min(int(math.log(max(count, 1), 1000)), 4)
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
