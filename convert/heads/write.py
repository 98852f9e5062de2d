"""Writes planned heads into an adapter folder: mtp_config.json, mtp.safetensors and a README.md. Needs no mlx.

mtp_config.json (format 1, method "mtp-heads"):

    base.name, base.fingerprint     the trunk; the fingerprint (`mtp_mlx.model.fingerprint`) is null where the
                                    checkpoint has no trunk that mlx-lm can load, and then cannot be compared
    heads.count, heads.drafts       number of heads, and of tokens that they draft in a step; head i predicts i + 2
                                    tokens after the hidden state's own
    heads.convention                every field of `heads.HeadConvention`
    heads.blocks                    for each head the mlx-lm class of its decoder layer(s), built as
                                    class(args_class.from_dict({**model_config, **overrides}), **layers[j]),
                                    and the window of its attention (rows, its own included) or null
    heads.model_config              the language model's configuration that the blocks are built from
    source                          family in words, files, what was dropped as a copy, notes
    training, acceptance, measurements    as in every adapter; empty here

mtp.safetensors holds the canonical tensors that `heads` names, in the checkpoint's own types: every norm is a plain
gain and every fuse weight embedding-first, whatever `convention` says of how they were stored. The tensors are
written one at a time, so heads of many gigabytes need no more memory than their largest tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_mlx.convert.heads.targets import HeadPlan, save_targets
from mtp_mlx.convert.read.checkpoint import Checkpoint

CONFIG_NAME = "mtp_config.json"
WEIGHTS_NAME = "mtp.safetensors"
FORMAT_VERSION = 1
METHOD = "mtp-heads"


@dataclass(frozen=True)
class Base:
    """The model that heads are for.

    Attributes:
        name: what the folder calls it.
        fingerprint: as `mtp_mlx.model.fingerprint` makes it; None if it is not known.
        unknown_because: why it is not known; empty if it is.
    """

    name: str
    fingerprint: str | None = None
    unknown_because: str = ""

    @property
    def notes(self) -> list[str]:
        """What the folder says about it besides."""
        reason = self.unknown_because
        return [f"the base's fingerprint is not known: {reason}"] if reason else []


def fill_folder(
    folder: Path,
    checkpoint: Checkpoint,
    plan: HeadPlan,
    base: Base,
    *,
    dtype: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write the files of an adapter folder into the folder `folder`, which is there and empty.

    Args:
        base: the model that the heads are for.
        dtype: "F32", "BF16" or "F16" to cast the tensors to; None to keep the types that they are stored in.
        progress: called with the name of each tensor before it is written.
    """
    config = heads_config(checkpoint, plan, base)
    save_targets(folder / WEIGHTS_NAME, plan.targets, checkpoint.tensors, progress, dtype)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(heads_card(config, plan), encoding="utf-8")


def heads_config(checkpoint: Checkpoint, plan: HeadPlan, base: Base) -> dict[str, Any]:
    """The content of mtp_config.json."""
    return {
        "format": FORMAT_VERSION,
        "method": METHOD,
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "heads": {
            "count": plan.count,
            "drafts": plan.drafts or plan.count,
            "convention": plan.convention.to_json(),
            "blocks": [block.to_json() for block in plan.blocks],
            "model_config": plan.model_config,
        },
        "source": {
            "family": plan.title,
            "files": checkpoint.files,
            "dropped": [{"tensor": name, "same_as": trunk} for name, trunk in plan.dropped],
            "notes": [*plan.notes, *base.notes],
        },
        "training": {},
        "acceptance": [],
        "measurements": {},
    }


def trunk_name(checkpoint: Checkpoint) -> str:
    """The model's name: what Medusa's config says it was made for, else the folder's own name."""
    named = checkpoint.config.get("base_model_name_or_path")
    if isinstance(named, str) and named:
        return named
    return checkpoint.folder.resolve().name


def heads_card(config: Mapping[str, Any], plan: HeadPlan) -> str:
    """The folder's README: what the heads are, where they come from, how to use them."""
    base, convention = config["base"], config["heads"]["convention"]
    source = config["source"]
    lines = [
        f"# MTP heads of {base['name']}",
        "",
        f"{plan.count} head(s) of the kind {plan.title}, converted by mtp-mlx from {', '.join(source['files'])}.",
        "The base model's own output is unchanged: what the heads draft is verified.",
        "",
        f"- base: {base['name']}, fingerprint "
        + (f"`{base['fingerprint']}`" if base["fingerprint"] else "not known"),
        f"- {len(plan.targets)} tensors; acceptance not measured",
        "",
        "## Convention",
        "",
        *[f"- {name.replace('_', ' ')}: {_words(value)}" for name, value in convention.items()],
        "",
    ]
    if plan.dropped:
        lines += ["## Left out, equal to the trunk's byte for byte", ""]
        lines += [f"- {name} = {trunk}" for name, trunk in plan.dropped] + [""]
    if source["notes"]:
        lines += ["## Notes", "", *[f"- {note}" for note in source["notes"]], ""]
    lines += [
        "## Use",
        "",
        "```",
        f"mtp-mlx generate --model {base['name']} --adapter . --prompt ...",
        "```",
        "",
    ]
    return "\n".join(lines)


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        ", ".join(name.replace("_", " ") for name in value) or "nothing"
        if isinstance(value, list)
        else str(value)
    )
