"""Heads in a repository on the hub: which of its files hold them, and those files alone.

The repository may be a model in its original form, of which only the shards with heads are fetched; heads split from
their model; or a model with its heads in a file beside the index. Nothing here needs mlx.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_mlx import hub
from mtp_mlx.adapter_folder import CONFIG_NAME
from mtp_mlx.convert.heads.families import find_cascade
from mtp_mlx.convert.read.checkpoint import TORCH_SUFFIXES, Checkpoint, open_checkpoint, sidecar_names
from mtp_mlx.convert.read.safetensors import SUFFIX
from mtp_mlx.drafters.gemma4_assistant.config import is_assistant
from mtp_mlx.errors import ConversionError
from mtp_mlx.hub_errors import hub_errors

_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"


@dataclass(frozen=True)
class Listing:
    """A repository.

    Attributes:
        name: owner/name.
        revision: its commit, so that all files are of one version.
        sizes: {file: bytes}.
    """

    name: str
    revision: str
    sizes: dict[str, int]

    @classmethod
    def of(cls, name: str) -> Listing:
        """Asks the hub.

        Raises MTPError: no such repository, no access or no network.
        """
        with hub_errors(f"{name} could not be read"):
            found = hub.hub_api().model_info(name, files_metadata=True)
        return cls(name, found.sha, {file.rfilename: int(file.size or 0) for file in found.siblings})

    def fetch(self, files: Collection[str]) -> Path:
        """The folder that these files of the repository are in, fetched if they are not yet."""
        with hub_errors(f"{self.name} could not be fetched"):
            return Path(
                hub.hub_api().snapshot_download(
                    self.name, revision=self.revision, allow_patterns=sorted(files)
                )
            )

    def object(self, file: str) -> dict[str, Any]:
        """The JSON object in a file; empty if there is no such file.

        Raises ConversionError: it holds something else.
        """
        if file not in self.sizes:
            return {}
        try:
            value = json.loads((self.fetch([file]) / file).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ConversionError(f"{self.name}: {file} is not a JSON object")
        return value


def fetch_heads(name: str, tell: Callable[[str], None]) -> Path | Checkpoint:
    """The heads in the repository `name`: a folder if it is an adapter of mtp-mlx, else the opened files.

    Args:
        tell: told what will be fetched, and how large it is.

    Raises MTPError: the hub cannot be reached, or the repository holds no heads.
    """
    listing = Listing.of(name)
    if CONFIG_NAME in listing.sizes:
        return listing.fetch(hub.FILES)
    files = head_files(listing)
    wanted = sum(listing.sizes[file] for file in files)
    whole = sum(size for file, size in listing.sizes.items() if file.endswith((SUFFIX, *TORCH_SUFFIXES)))
    tell(f"fetching the MTP heads of {name}: {len(files)} file(s), {gigabytes(wanted)} of {gigabytes(whole)}")
    configs = {_CONFIG, "params.json", "adapter_config.json"} & listing.sizes.keys()
    return open_checkpoint(listing.fetch([*files, *configs]), only=files)


def describe_repository(name: str) -> dict[str, Any]:
    """Facts about the repository `name` for `mtp-mlx info`: its size, and which of its files hold heads.

    No weights are fetched.

    Raises MTPError: the hub cannot be reached, or there is no such repository.
    """
    listing = Listing.of(name)
    sizes = listing.sizes
    facts: dict[str, Any] = {"kind": "repository", "name": name, "size": sum(sizes.values())}
    if CONFIG_NAME in sizes:
        return facts | {"holds": "an adapter of mtp-mlx"}
    try:
        files = head_files(listing)
    except ConversionError as error:
        return facts | {"mtp heads": f"none: {error}"}
    return facts | {"mtp heads": {"files": files, "size": sum(sizes[file] for file in files)}}


def head_files(listing: Listing) -> list[str]:
    """Names of the weight files of a repository that hold heads.

    Raises ConversionError: none does.
    """
    config = listing.object(_CONFIG)
    if is_assistant(config):  # all of it
        return _all_weights(listing)
    beside = next((name for name in sidecar_names(config) if name in listing.sizes), None)
    if beside is not None:
        return [beside]
    if _INDEX in listing.sizes:
        weight_map = listing.object(_INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConversionError(f"{listing.name}: {_INDEX} has no weight_map")
        names = _needed(listing, weight_map.keys(), config)
        return sorted({str(weight_map[name]) for name in names})
    files = sorted(file for file in listing.sizes if file.endswith(SUFFIX) and "/" not in file)
    if len(files) == 1:
        with hub_errors(f"{listing.name} could not be read"):
            header = hub.hub_api().parse_safetensors_file_metadata(
                listing.name, files[0], revision=listing.revision
            )
        _needed(listing, header.tensors.keys(), config)
    files = files or sorted(file for file in listing.sizes if file.endswith(TORCH_SUFFIXES))
    if not files:
        raise ConversionError(f"{listing.name}: the repository holds no weights")
    return files


def _all_weights(listing: Listing) -> list[str]:
    """Every safetensors file at the top of a repository.

    Raises ConversionError: there is none.
    """
    files = sorted(file for file in listing.sizes if file.endswith(SUFFIX) and "/" not in file)
    if not files:
        raise ConversionError(f"{listing.name}: the repository holds no {SUFFIX} files")
    return files


def _needed(listing: Listing, names: Collection[str], config: dict[str, Any]) -> set[str]:
    """The tensors of those `names` that heads are made of.

    Raises ConversionError: none is a head's, or the heads are of an unsupported kind.
    """
    text = Checkpoint(Path(listing.name), "", {}, config).text_config
    try:
        found = find_cascade(names, text)
    except ConversionError as error:
        raise ConversionError(f"{listing.name}: {error}") from error
    if found is None:
        raise ConversionError(
            f"{listing.name}: none of its {len(names)} tensors is an MTP head's; heads are often in a repository of "
            "their own, or only in the model's original"
        )
    sources = {name for target in found.targets for name, _ in target.sources}
    return (found.owned | sources) & set(names)


def gigabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
