"""What an adapter folder says of its MTP heads: their section of the header, their lines of the model card.

    heads.count, heads.drafts       number of heads, and of tokens that they draft in a step; head i (from 0) predicts
                                    the token i + 2 places after the hidden state's own
    heads.convention                every field of `HeadConvention`
    heads.blocks                    for each head how its decoder block is built: {"like": "last layer"} copies the
                                    base's last layer (heads trained here), {"like": "last layers", "layers": n}
                                    its last n; else a class of mlx-lm, made as
                                    class(args_class.from_dict({**model_config, **overrides}), **layers[j]),
                                    and the window of its attention (rows, its own included) or null
    heads.taps                      numbers (from 1) of the base's layers whose states the first head reads besides
                                    the one that the convention names; absent or [] for none
    heads.quantization              {"group_size": 64, "bits": 8}, if linear layers are stored so, as in mlx-lm;
                                    further "mode", and "layers": {name of a layer: the same, where it differs}
    heads.model_config              the language model's configuration that those blocks are built from

The tensors are `heads.{i}.fuse.weight` and so on, `fusion.fuse.weight` and `fusion.norms.{j}.weight` with taps, and
`draft_ids` where there is a draft vocabulary. One head that drafts several tokens is used for each in turn. Every
norm is a plain gain and every fuse weight embedding-first, whatever `convention` says of how a checkpoint stored
them.

Needs no mlx.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_mlx.adapter_folder import CardLines, Header, bullets, check_method, damage, paper
from mtp_mlx.drafters.heads.convention import MOST_HEADS, HeadConvention

METHOD = "mtp-heads"
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")  # of quantisation, as mlx calls them
PLACES = {
    "post-norm": "after the last norm",
    "pre-norm": "before the last norm",
    "before-last-layer": "before the last layer",
}


@dataclass
class HeadsConfig:
    """What a folder says of its heads: how they are built and run.

    Attributes:
        convention: how they are run.
        blocks: how each head's decoder block is built, see the module; Medusa's heads have none.
        model_config: the configuration that blocks are built from; empty where none is.
        drafts: tokens drafted in each step, by default one for each head; more apply the heads again in turn.
        count: number of heads, by default one for each block.
        taps: numbers (from 1) of the base's layers that the first head reads too.
        quantization: "group_size" and "bits" of quantised layers, their "mode" if it is not affine, and "layers" with
            those that differ, by name; empty if none is quantised.
    """

    convention: HeadConvention
    blocks: list[dict[str, Any]]
    model_config: dict[str, Any] = field(default_factory=dict)
    drafts: int = 0
    count: int = 0
    taps: list[int] = field(default_factory=list)
    quantization: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.count = self.count or len(self.blocks)
        self.drafts = self.drafts or self.count

    def to_json(self) -> dict[str, Any]:
        """The section `heads` of the header."""
        return {
            "count": self.count,
            "drafts": self.drafts,
            "convention": self.convention.to_json(),
            "blocks": self.blocks,
            "taps": self.taps,
            "model_config": self.model_config,
            **({"quantization": self.quantization} if self.quantization else {}),
        }


def heads_header(config: HeadsConfig, base_name: str, base_fingerprint: str | None, **about: Any) -> Header:
    """The header of a folder of heads; `about`: what else `Header` holds."""
    about["source"] = {"family": config.convention.family} | about.get("source", {})
    return Header(METHOD, base_name, base_fingerprint, {"heads": config.to_json()}, **about)


def config_of(folder: Path, header: Header) -> HeadsConfig:
    """What the header of `folder` says of its heads.

    Raises:
        MTPError: if the folder is of another method, or damaged.
    """
    check_method(folder, header, METHOD)
    with damage(folder):
        section = header.own["heads"]
        convention = dict(section["convention"])
        convention["unsettled"] = tuple(convention.get("unsettled", ()))
        config = HeadsConfig(
            convention=HeadConvention(**convention),
            blocks=list(section["blocks"]),
            model_config=dict(section.get("model_config", {})),
            drafts=int(section.get("drafts", 0)),
            count=int(section["count"]),
            taps=list(section.get("taps", [])),
            quantization=dict(section.get("quantization", {})),
        )
        _check(config)
        return config


def _check(config: HeadsConfig) -> None:
    """Raises ValueError for what reading alone does not find: the rest of the package takes these for granted."""
    count, drafts, blocks = config.count, config.drafts, config.blocks
    if not 1 <= count <= MOST_HEADS or not 1 <= drafts <= MOST_HEADS:
        raise ValueError(f"{count} heads that draft {drafts} tokens a step; both must be 1 to {MOST_HEADS}")
    if config.convention.kind != "medusa" and len(blocks) != count:
        raise ValueError(f"{count} heads, but {len(blocks)} blocks")
    if not all(isinstance(block, dict) for block in blocks):
        raise ValueError("a head's block is not a JSON object")
    for layers in (block["layers"] for block in blocks if "layers" in block):
        if not (type(layers) is int and layers > 0) and not (isinstance(layers, list) and layers):
            raise ValueError(
                f"a head's block has layers {layers!r}, which is neither a number of layers nor a list"
            )
    if not all(type(number) is int for number in config.taps) or config.taps != sorted(set(config.taps)):
        raise ValueError(f"taps are {config.taps!r}, not ascending numbers of layers")
    if config.taps and config.convention.kind != "cascade":
        raise ValueError(f"heads of the kind {config.convention.kind!r} have taps")
    _check_quantization(config.quantization)
    plain = HeadConvention("")
    for name in (item.name for item in dataclasses.fields(plain)):
        value = getattr(config.convention, name)
        if type(value) is not type(getattr(plain, name)):
            raise ValueError(f"the convention's {name} is {value!r}")


def _check_quantization(quantization: dict[str, Any]) -> None:
    """Raises ValueError if it is not as `HeadsConfig` says."""
    layers = quantization.get("layers", {})
    if not isinstance(layers, dict):
        raise ValueError(f"the quantization has layers {layers!r}, not a JSON object")
    usual = {key: value for key, value in quantization.items() if key != "layers"}
    for one in (usual, *layers.values()) if quantization else ():
        known = isinstance(one, dict) and {"group_size", "bits"} <= one.keys() <= {
            "group_size",
            "bits",
            "mode",
        }
        if not known or not (type(one["group_size"]) is type(one["bits"]) is int):
            raise ValueError(f"the quantization is {one!r}, not a group size and bits")
        if one.get("mode", "affine") not in MODES:
            raise ValueError(f"the quantization has the mode {one['mode']!r}, not one of {', '.join(MODES)}")


def block_layers(spec: dict[str, Any]) -> int:
    """Number of decoder layers of a block."""
    layers = spec.get("layers", 1)
    return len(layers) if isinstance(layers, list) else int(layers)


def states_read(config: HeadsConfig) -> str:
    """The states of the base model that the first head reads, in words."""
    last = PLACES.get(config.convention.first_hidden, config.convention.first_hidden)
    if not config.taps:
        return f"the state {last}"
    return f"the states after layers {', '.join(map(str, config.taps))} and {last}"


def facts(folder: Path, header: Header) -> dict[str, Any]:
    """What `mtp-mlx info` shows of the method's own section."""
    config = config_of(folder, header)
    return {
        "family": header.source.get("family", config.convention.family),
        "heads": config.count,
        "drafts": config.drafts,
        "layers": "/".join(map(str, sorted({block_layers(block) for block in config.blocks}))),
        "reads": states_read(config),
        "stored": f"{config.quantization.get('bits')}-bit" if config.quantization else "not quantised",
        "convention": {name.replace("_", " "): value for name, value in config.convention.to_json().items()},
    }


def _made(files: str, trained: bool) -> str:
    """Where heads come from, in words: converted from `files`, trained here, or both."""
    if not files:
        return "trained by mtp-mlx"
    return f"converted by mtp-mlx from {files}" + (", then trained by mtp-mlx" if trained else "")


def card_lines(folder: Path, header: Header) -> CardLines:
    """The method's lines of the model card."""
    config, source = config_of(folder, header), header.source
    convention = {name: value for name, value in config.convention.to_json().items() if value != ""}
    convention["unsettled"] = [name.replace("_", " ") for name in convention["unsettled"]]
    with damage(folder):
        files, notes = ", ".join(source.get("files", [])), source.get("notes", [])
        dropped = [f"- {one['tensor']} = {one['same_as']}" for one in source.get("dropped", [])]
    return CardLines(
        title=f"MTP heads for {header.base_name}",
        about=(
            f"{config.count} head(s) that draft {config.drafts} token(s) a step"
            + (f" and read {states_read(config)}, " if config.taps else ", ")
            + f"{_made(files, trained=bool(header.training))}.\n"
            + "The base model's own output is unchanged: drafts are verified."
        ),
        method=(f"MTP heads, {source.get('family')}" if files else paper("MTP heads", "2603.23911")),
        sections={
            "Source": "",
            "Convention": bullets(convention),
            "Left out, equal to the trunk's byte for byte": "\n".join(dropped),
            "Notes": "\n".join(f"- {note}" for note in notes),
        },
    )
