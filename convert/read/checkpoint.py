"""Opens a checkpoint of any container: its tensors by name, read lazily, and its configuration.

A source may be a folder (safetensors, sharded or not; PyTorch files, sharded or not; Medusa's head file; Meta's
consolidated.pth with params.json; a PEFT adapter), one file of these kinds, or the id of a repository on the hub,
which is downloaded first. Nothing here needs mlx or torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_mlx.convert.read.lazy_tensor import LazyTensor
from mtp_mlx.convert.read.safetensors import (
    SUFFIX,
    check_index,
    dequantised,
    merge,
    read_safetensors,
    shard_files,
)
from mtp_mlx.convert.read.torch_pickle import read_torch
from mtp_mlx.errors import ConversionError

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
SUFFIXES = (SUFFIX, *TORCH_SUFFIXES)
# Prefixes of the files in a training folder that do not hold weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
# Prefixes that training programs put before every name of a model.
_WRAPPERS = ("model.", "module.", "_orig_mod.", "net.")
# Files of heads beside the index, as MTPLX, vllm-mlx and mlx-optiq write them.
_SIDECARS = ("mtp.safetensors", "mtp/weights.safetensors", "model-mtp.safetensors", "optiq/mtp.safetensors")
_CONFIGS = ("config.json", "params.json", "adapter_config.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# NAME.gguf.part1of2, NAME.gguf-split-a: pieces of a file that was too large for where it lay.
_GGUF_PIECE = re.compile(r"\.gguf[-.](part|split)", re.IGNORECASE)
# What is downloaded beside the weights.
_BESIDE = ["*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]


@dataclass
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: the folder or file.
        container: "safetensors" or "pytorch".
        tensors: by name; fp8 weights with block scales appear as bfloat16.
        config: the content of config.json (or params.json, adapter_config.json); empty if there is none.
        config_name: which of these it is; "" if there is none.
        values: plain values beside the tensors of a PyTorch file (Lightning's hyper_parameters).
        files: names of the files that hold the tensors.
        beside: those of them that hold heads beside the index, which mlx-lm does not read.
        fp8: some weights are stored as fp8 with block scales.
    """

    path: Path
    container: str
    tensors: dict[str, LazyTensor]
    config: dict[str, Any] = field(default_factory=dict)
    config_name: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    fp8: bool = False

    @property
    def folder(self) -> Path:
        """The folder that holds the weights and the files beside them."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the configuration (multi-modal models nest it)."""
        inner = self.config.get("text_config")
        return {**self.config, **inner} if isinstance(inner, dict) else self.config


def open_checkpoint(path: str | Path, only: Sequence[str] = ()) -> Checkpoint:
    """Open the checkpoint at `path`. Reads headers and the configuration, not weights.

    Args:
        only: names of the files to read in a folder of which others may be missing; empty for the whole checkpoint.

    Raises FileNotFoundError, or ConversionError: not a checkpoint, or a damaged or incomplete one.
    """
    path = Path(path)
    if only:
        container, parts, values = _files(path / name for name in only)
    elif path.is_dir():
        container, parts, values = _folder(path)
    elif path.suffix.lower() in SUFFIXES:
        container, parts, values = _files([path])
    else:
        path.stat()
        if _GGUF_PIECE.search(path.name):
            raise ConversionError(
                f"{path}: this is a piece of a .gguf file that was cut by size: join the pieces in order first, "
                "as in `cat PIECE1 PIECE2 > model.gguf`"
            )
        raise ConversionError(
            f"{path}: only checkpoint folders and files ending in .gguf, {', '.join(SUFFIXES)} can be converted"
        )
    stored = merge(parts)
    config, config_name = _config(path if path.is_dir() else path.parent, stored)
    files = list(only) or [file.name for file in parts]
    beside = _heads_beside(path, config, files, stored) if path.is_dir() and not only else {}
    stored |= {name: tensor for tensors in beside.values() for name, tensor in tensors.items()}
    tensors = _unwrapped(dequantised(stored, path, fp8_block(config)))
    if not tensors:
        raise ConversionError(f"{path}: there are no tensors in it; is the download complete?")
    fp8 = any(tensor.dtype == "F8_E4M3" for tensor in stored.values())
    return Checkpoint(
        path, container, tensors, config, config_name, values, [*files, *beside], list(beside), fp8
    )


_Parts = tuple[str, dict[Path, dict[str, LazyTensor]], dict[str, Any]]


def _folder(path: Path) -> _Parts:
    """The weights in a folder: the files of its index if it has one, otherwise all files of one container.

    Safetensors are preferred to PyTorch files, which are often the same weights again.
    """
    for suffixes, pattern in (((SUFFIX,), "*.safetensors.index.json"), (TORCH_SUFFIXES, "*.bin.index.json")):
        # "model..." first: Meta's own copy of some models lies beside it, as "consolidated...".
        for index in sorted(path.glob(pattern), key=lambda file: (not file.name.startswith("model"), file)):
            files = shard_files(index)
            found = _files(path / name for name in sorted(files))
            check_index(index, files, merge(found[1]))
            return found
        weights = sorted(
            file
            for file in path.iterdir()
            if file.suffix in suffixes and not file.name.startswith(_NO_WEIGHTS)
        )
        weights = [file for file in weights if not file.name.startswith("consolidated")] or weights
        if weights:
            return _files(weights)
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    if gguf:
        raise ConversionError(
            f"{path}: this is a folder: give one of the .gguf files in it, such as {path / gguf[0]}"
        )
    raise ConversionError(
        f"{path}: not a checkpoint: the folder has no {', '.join(SUFFIXES)} file; is the download complete?"
    )


def _files(paths: Iterable[Path]) -> _Parts:
    parts: dict[Path, dict[str, LazyTensor]] = {}
    values: dict[str, Any] = {}
    container = "safetensors"
    for path in paths:
        if path.suffix.lower() == SUFFIX:
            parts[path] = read_safetensors(path)
            continue
        container = "pytorch"
        found = read_torch(path)
        parts[path] = found.tensors
        values |= found.values
    return container, parts, values


def _unwrapped(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` without the prefix that a training program (Lightning, DDP, torch.compile) put before every name."""
    for prefix in _WRAPPERS:
        if prefix + "model.embed_tokens.weight" in tensors and all(n.startswith(prefix) for n in tensors):
            return _unwrapped({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


def sidecar_names(config: dict[str, Any]) -> list[str]:
    """Where other programs put a model's heads in a file of its own, relative to the model's folder."""
    extra = config.get("mlx_lm_extra_tensors")
    named = extra.get("mtp_file") if isinstance(extra, dict) else None
    own = [named] if isinstance(named, str) and not {"/", ".."} & {*Path(named).parts} else []
    return list(dict.fromkeys([*own, *_SIDECARS]))


def _heads_beside(
    folder: Path, config: dict[str, Any], files: list[str], stored: dict[str, LazyTensor]
) -> dict[str, dict[str, LazyTensor]]:
    """{file: its tensors} of the first sidecar with heads that are not among the stored tensors already."""
    for name in sidecar_names(config):
        if name in files or not (folder / name).is_file():
            continue
        tensors = heads_named(read_safetensors(folder / name))
        if tensors.keys() & stored.keys():
            continue
        return {name: tensors}
    return {}


def heads_named(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of a sidecar under the names that heads have in a model, if they have those inside their module."""
    if not any(name.startswith("fc.") for name in tensors):
        return tensors
    return {f"mtp.{name}": tensor for name, tensor in tensors.items()}


def _config(folder: Path, names: Iterable[str]) -> tuple[dict[str, Any], str]:
    # The config.json beside an adapter is often its base's, and does not say how large the adapter's updates are.
    is_adapter = any(".lora_A." in name or ".lora_B." in name for name in names)
    for name in reversed(_CONFIGS) if is_adapter else _CONFIGS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{path} is not JSON: {error}; get the file again") from error
        if not isinstance(config, dict):
            raise ConversionError(f"{path} is not a model's configuration; get the file again")
        return config, name
    return {}, ""


def fp8_block(config: dict[str, Any]) -> tuple[int, int]:
    """(rows, columns) of the blocks that share an fp8 scale."""
    quantisation = config.get("quantization_config")
    size = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    return 128, 128


# --- sources on the hub -------------------------------------------------------------------------------------


def is_hub_id(source: str) -> bool:
    """Whether `source` is the id of a repository on the hub: owner/name, and not a path that exists."""
    return _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def local_source(source: str) -> Path:
    """The local path of `source`, which is downloaded first if it is the id of a repository on the hub.

    PyTorch files are downloaded only if the repository has no safetensors.

    Raises ConversionError: the download failed.
    """
    if not is_hub_id(source):
        return Path(source).expanduser()
    import huggingface_hub  # takes a while, and most sources are local

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
        except (OSError, ValueError, RuntimeError) as error:  # its errors are subclasses of these
            reason = " ".join(str(error).split())[:300]
            raise ConversionError(
                f"{source}: not a file or folder here, and it could not be downloaded from the hub "
                f"({type(error).__name__}: {reason}); check the name, or download it and give the folder"
            ) from error

    folder = fetch([*_BESIDE, "*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        folder = fetch([*_BESIDE, *(f"*{suffix}" for suffix in TORCH_SUFFIXES)])
    return folder
