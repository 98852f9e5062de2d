"""The adapter folder, one format for every drafter: `mtp_config.json`, `mtp.safetensors` and a generated `README.md`.

mtp_config.json:

    "format": 1
    "method": "mask-tokens"                        which drafter it is, see `mtp_mlx.drafters.registry`
    "base": {"name": ..., "fingerprint": ..., "sample": {...}}    the model it was made for
    "adapter": {...}                               the method's own section, under a name that the method chooses
    "source": {...}                                where converted weights come from
    "training": {...}, "acceptance": [0.5, 0.4], "measurements": {...}
    "acceptance_by_precision": {"float32": [0.5, 0.4], "4-bit": [0.48, 0.39]}    by the base's own precision
    "mask": {...}                                  of a model with a mask token of its own

An adapter works with its own base model only, in any precision; the fingerprint and the sampled weights tell another
one apart. The folder may lie inside the
model's, as `MODEL/mtp`: then `load` finds it there. Reading headers needs no mlx.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mtp_mlx.adapter_faults import not_an_adapter
from mtp_mlx.errors import MTPError
from mtp_mlx.files import new_folder, write_text

if TYPE_CHECKING:
    import mlx.core as mx

    from mtp_mlx.model.base_sample import BaseSample

CONFIG_NAME = "mtp_config.json"
WEIGHTS_NAME = "mtp.safetensors"
CARD_NAME = "README.md"
FORMAT_VERSION = 1
DRAFT_IDS = "draft_ids"  # [N] int32, the one tensor that is no weight: ids that may be drafted
SIDECAR = "mtp"  # name of an adapter folder inside its model's

_COMMON = (
    *("format", "method", "base", "source", "training"),
    *("acceptance", "acceptance_by_precision", "measurements", "mask"),
)

_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "text"}


@dataclass(frozen=True)
class Header:
    """What an adapter folder says about itself: everything but the weights.

    Attributes:
        method: which drafter it is, a key into `mtp_mlx.drafters.registry`.
        base_name: the base model as the user named it.
        base_fingerprint: see `mtp_mlx.model.fingerprint.base_fingerprint`; None if it is not known.
        own: the method's own section under its name, as in the file: {"adapter": {...}}. The method's room reads it.
        training: how it was trained: data, steps, settings; free-form.
        base_sample: see `mtp_mlx.model.base_sample`; None in older folders, and if the base was not at hand.
        base_recurrent: whether the base has recurrent state, so that slots have the linear layout only; if known.
        acceptance: for each depth the share of drafts accepted, given that those before were; empty if not measured.
        acceptance_by_precision: the same by the base's precision (`mtp_mlx.model.precision`); empty in older folders.
        measurements: named reports, free-form.
        source: where converted weights come from, free-form.
        mask: of a model with a mask token of its own: the token's id and name, and how its makers prompt and stop it;
            free-form and for people, decoding takes the mask's embedding from the weights.
    """

    method: str
    base_name: str
    base_fingerprint: str | None
    own: Mapping[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    acceptance: list[float] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    mask: dict[str, Any] = field(default_factory=dict)
    base_sample: BaseSample | None = None
    base_recurrent: bool = False
    acceptance_by_precision: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of `mtp_config.json`."""
        sample, by_precision = self.base_sample, self.acceptance_by_precision
        return {
            "format": FORMAT_VERSION,
            "method": self.method,
            "base": {
                "name": self.base_name,
                "fingerprint": self.base_fingerprint,
                **({} if sample is None else {"sample": sample.to_json()}),
                **({"recurrent": True} if self.base_recurrent else {}),
            },
            **self.own,
            **({"source": self.source} if self.source else {}),
            "training": self.training,
            "acceptance": self.acceptance,
            **({"acceptance_by_precision": by_precision} if by_precision else {}),
            "measurements": self.measurements,
            **({"mask": self.mask} if self.mask else {}),
        }

    def text(self) -> str:
        """`mtp_config.json` as it is written."""
        return json.dumps(self.to_json(), indent=2) + "\n"


# --- reading --------------------------------------------------------------------------------------------------


def sidecar(model: str | Path) -> Path | None:
    """The adapter folder inside the model folder `model`, or None. A hub id has none."""
    folder = Path(model) / SIDECAR
    return folder if (folder / CONFIG_NAME).is_file() else None


def read_header(folder: Path) -> Header:
    """Reads `mtp_config.json`.

    Raises:
        MTPError: if there is no adapter, or its config is damaged or of another format.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise MTPError(not_an_adapter(Path(folder), CONFIG_NAME))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MTPError(f"{path} cannot be read: {error}") from error
    with damage(folder):
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
        if raw["format"] != FORMAT_VERSION:
            raise MTPError(
                f"{path} has format {raw['format']!r}, and this version of mtp-mlx reads format {FORMAT_VERSION}"
            )
        base = _typed(raw, "base", dict)
        return Header(
            method=_typed(raw, "method", str),
            base_name=_typed(base, "name", str),
            base_fingerprint=None if base["fingerprint"] is None else _typed(base, "fingerprint", str),
            own={key: value for key, value in raw.items() if key not in _COMMON},
            training=_typed(raw, "training", dict, {}),
            acceptance=_numbers(_typed(raw, "acceptance", list, [])),
            measurements=_typed(raw, "measurements", dict, {}),
            source=_typed(raw, "source", dict, {}),
            mask=_typed(raw, "mask", dict, {}),
            base_sample=_sample(_typed(base, "sample", dict)) if "sample" in base else None,
            base_recurrent=_typed(base, "recurrent", bool) if "recurrent" in base else False,
            acceptance_by_precision=_by_precision(_typed(raw, "acceptance_by_precision", dict, {})),
        )


def _typed(raw: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """The value of `key`; raises KeyError if it is missing and has no default, ValueError if of another type."""
    value = raw[key] if default is None else raw.get(key, default)
    if not isinstance(value, kind):
        raise ValueError(f"{key!r} is {value!r}, not {_KINDS[kind]}")
    return value


def _numbers(values: list[Any]) -> list[float]:
    if not all(type(value) in (int, float) for value in values):
        raise ValueError(f"'acceptance' is {values!r}, not a list of numbers")
    return values


def _sample(raw: dict[str, Any]) -> BaseSample:
    from mtp_mlx.model.base_sample import BaseSample

    return BaseSample.from_json(raw)


def _by_precision(raw: dict[str, Any]) -> dict[str, list[float]]:
    return {precision: _numbers(_typed(raw, precision, list)) for precision in raw}


@contextmanager
def damage(folder: Path) -> Iterator[None]:
    """Turns what reading a damaged `mtp_config.json` raises into one sentence.

    Raises:
        MTPError: for a missing key, a value of the wrong type, or an impossible one.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        yield
    except KeyError as error:
        raise MTPError(f"{path} is damaged: it has no {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise MTPError(f"{path} is damaged: {error}") from error


def check_method(folder: Path, header: Header, method: str) -> None:
    """Raises MTPError where the adapter in `folder` is of another method than `method`."""
    if header.method != method:
        raise MTPError(f"the adapter {folder} is of the method '{header.method}', not '{method}'")


def read_tensors(folder: Path, lazy: bool = False) -> dict[str, mx.array]:
    """Every tensor of an adapter folder, by name.

    Args:
        lazy: read the values when they are first used.

    Raises:
        MTPError: if the file is missing or damaged.
    """
    import mlx.core as mx

    path = Path(folder) / WEIGHTS_NAME
    try:
        tensors = cast("dict[str, mx.array]", mx.load(str(path)))
        if not lazy:
            mx.eval(tensors)
    except (RuntimeError, ValueError, OSError) as error:
        raise MTPError(f"{path} is missing or damaged: {error}") from error
    return tensors


def count_weights(sizes: Mapping[str, int]) -> int:
    """Weights in tensors of these sizes, without the draft vocabulary and what quantised weights are scaled by."""
    return sum(size for name, size in sizes.items() if name != DRAFT_IDS and not _scales(name, sizes))


def _scales(name: str, sizes: Mapping[str, int]) -> bool:
    """Whether a tensor holds scales or biases of a quantised weight."""
    owner, _, last = name.rpartition(".")
    return last in ("scales", "biases") and f"{owner}.weight" in sizes


def tensor_sizes(tensors: Mapping[str, mx.array]) -> dict[str, int]:
    """How many numbers each tensor has; of quantised weights those that are packed in it, told by their scales."""
    sizes = {name: tensor.size for name, tensor in tensors.items()}
    for name, scales in tensors.items():
        weight = f"{name.removesuffix('scales')}weight"
        if name.endswith(".scales") and weight in tensors and scales.size:
            floating = "uint8" in str(scales.dtype)
            words = tensors[weight].size // scales.size  # of 32 bits in a group
            small = (
                {2: 16, 4: 32, 8: 32} if floating else {4: 32}
            )  # nvfp4, mxfp4, mxfp8; 4 bits in groups of 32
            sizes[weight] = scales.size * small.get(words, 64)
    return sizes


# --- the model card -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CardLines:
    """What a method adds to the model card.

    Attributes:
        title: what the folder is, and for which model.
        about: a paragraph.
        method: the method in words, with its paper.
        facts: about the adapter's shape, one line each.
        sections: further sections, {heading: text}; "Source" takes the place of the one made of `Header.source`.
        commands: how to use it; one `mtp-mlx generate` if empty.
    """

    title: str
    about: str
    method: str
    facts: tuple[str, ...] = ()
    sections: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()


def paper(words: str, number: str) -> str:
    """A method in words with a link to its paper on arXiv."""
    return f"{words} ([arXiv {number}](https://arxiv.org/abs/{number}))"


def model_card(header: Header, lines: CardLines, sizes: Mapping[str, int]) -> str:
    """The folder's README: what it is, base, method, acceptance, provenance, measurements, how to use it.

    Args:
        sizes: of its tensors, see `tensor_sizes`.
    """
    base, fingerprint = header.base_name, header.base_fingerprint
    facts = [
        f"base: {base}, fingerprint " + (f"`{fingerprint}`" if fingerprint else "not known"),
        f"method: {lines.method}",
        *lines.facts,
        f"draft vocabulary: {sizes.get(DRAFT_IDS, 'whole')}",
        f"weights: {count_weights(sizes) / 1e6:.2f} M",
        f"acceptance per depth on held-out text: {_acceptance_words(header)}",
    ]
    commands = lines.commands or (f"mtp-mlx generate --model {base} --adapter . --prompt ...",)
    reports = {
        name: code_block(json.dumps(report, indent=2), "json") for name, report in header.measurements.items()
    }
    sections = {
        "Source": bullets(header.source),
        **lines.sections,
        "Mask token": bullets(header.mask),
        "Training": bullets(header.training),
        **reports,
        "Use": code_block("\n".join(commands)),
    }
    parts = [f"# {lines.title}", lines.about, "\n".join(f"- {fact}" for fact in facts)]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def _acceptance_words(header: Header) -> str:
    known = header.acceptance_by_precision or {"": header.acceptance}
    shown = {
        precision: " / ".join(f"{value:.2f}" for value in values)
        for precision, values in known.items()
        if values
    }
    words = "; ".join(
        f"{depths} (base in {precision})" if precision else depths for precision, depths in shown.items()
    )
    return words or "not measured"


def bullets(facts: Mapping[str, Any]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {name.replace('_', ' ')}: {words(value)}" for name, value in facts.items())


def words(value: Any) -> str:
    """A JSON value for people."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return (
            ", ".join(f"{name.replace('_', ' ')} {words(inner)}" for name, inner in value.items()) or "none"
        )
    if isinstance(value, list | tuple):
        return "; ".join(map(words, value)) or "none"
    return str(value)


def code_block(text: str, language: str = "") -> str:
    """Code in Markdown."""
    return f"```{language}\n{text}\n```"


# --- writing --------------------------------------------------------------------------------------------------


def write_adapter_folder(
    folder: Path,
    header: Header,
    tensors: Mapping[str, mx.array],
    card: CardLines,
    dtype: mx.Dtype | Mapping[str, mx.Dtype] | None = None,
) -> None:
    """Writes the folder whole or not at all; weights in `dtype`, or each in its own; bfloat16 by default.

    Raises:
        MTPError: if it cannot be written.
    """
    with new_folder(Path(folder)) as temporary:
        put_adapter(temporary, header, tensors, card, dtype)


def put_adapter(
    folder: Path,
    header: Header,
    tensors: Mapping[str, mx.array],
    card: CardLines,
    dtype: mx.Dtype | Mapping[str, mx.Dtype] | None = None,
) -> None:
    """Puts the three files into a folder that is being made."""
    import mlx.core as mx

    of_each = dtype if isinstance(dtype, Mapping) else dict.fromkeys(tensors, dtype or mx.bfloat16)
    stored = {
        name: value.astype(of_each.get(name, mx.bfloat16))
        if mx.issubdtype(value.dtype, mx.floating)
        else value
        for name, value in tensors.items()
    }
    mx.save_safetensors(str(folder / WEIGHTS_NAME), stored, metadata={"format": "mlx"})
    put_texts(folder, header, model_card(header, card, tensor_sizes(stored)))


def put_texts(folder: Path, header: Header, card: str) -> None:
    """Puts the config and the card beside the weights."""
    (folder / CONFIG_NAME).write_text(header.text(), encoding="utf-8")
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def write_header(folder: Path, header: Header) -> None:
    """Replaces the config of an adapter folder.

    Raises:
        MTPError: if it cannot be written.
    """
    write_text(Path(folder) / CONFIG_NAME, header.text())
