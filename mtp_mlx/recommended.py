"""The sampling that a model's makers recommend: `generation_config.json` in its folder, as transformers reads it.

Fields: do_sample, temperature, top_k, top_p, min_p and repetition_penalty. What the file does not name is off: the
defaults of transformers (top_k 50) are nobody's recommendation. Without do_sample, any of the others but the penalty
means sampling. The tokens in the file that end a text are read by mlx-lm.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.errors import MTPError
from mtp_mlx.files import warn_once

FILE = "generation_config.json"
WARPS = ("temperature", "top_k", "top_p", "min_p")


def recommended_sampling(folder: Path) -> SamplingConfig | None:
    """The recommendation in a model folder.

    Returns:
        None if there is none, or it is greedy decoding, or its values make no sense, which is said once.
    """
    try:
        given = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # mlx-lm does without the file, too
        return None
    if not isinstance(given, dict):
        return None
    found = {name: given[name] for name in (*WARPS, "repetition_penalty") if given.get(name) is not None}
    samples = given.get("do_sample")
    if samples is None:
        samples = any(name in found for name in WARPS)
    try:
        plain = replace(SamplingConfig(), **{name: _number(name, value) for name, value in found.items()})
    except MTPError as error:
        warn_once(f"{folder / FILE}", f"{folder / FILE} recommends no sampling that can be used. {error}")
        return None
    if samples and "temperature" not in found:
        plain = replace(plain, temperature=1.0)
    elif not samples:
        plain = SamplingConfig(repetition_penalty=plain.repetition_penalty)
    return None if plain == SamplingConfig() else plain


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MTPError(f"Sampling: {name} is {value!r} but must be a number.")
    return value


def in_words(sampling: SamplingConfig) -> str:
    """The values of a recommendation that differ from greedy decoding."""
    plain = SamplingConfig()
    values = ((name, getattr(sampling, name)) for name in (*WARPS, "repetition_penalty"))
    return ", ".join(f"{name} {value:g}" for name, value in values if value != getattr(plain, name))
