"""One case of the search: a model, what drafts for it, how tokens are picked, and the texts to write.

A case is data. It says everything that decides a run, so its JSON reproduces the run on any machine.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from mtp_mlx.config import from_dict
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.errors import MTPError

DtypeName = Literal["float32", "float16", "bfloat16"]
DrafterName = Literal[
    "none",
    "mask-tokens",
    "one-mask",
    "ptp-o",
    "ptp-c",
    "mtp-heads",
    "looped-heads",
    "medusa-heads",
    "parallel-heads",
    "draft-model",
]
CaseLayout = Literal["plain", "linear", "quadratic", "tree", "auto", "mixed"]
LookupName = Literal["none", "text", "memory", "knowing"]
Way = Literal["alone", "turns", "batch"]

BIAS = 1.3
SLOT_DRAFTERS = ("mask-tokens", "one-mask", "ptp-o", "ptp-c")


@dataclass(frozen=True)
class Text:
    """One text to write.

    Attributes:
        prompt: token ids.
        max_tokens: most tokens to write.
        taken: tokens after which a turn is closed; 0 for all of them.
        joins: step of the batch before which it joins.
        alone_after: steps in the batch after which it leaves and goes on by itself; 0 for never.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 12
    taken: int = 0
    joins: int = 0
    alone_after: int = 0


@dataclass(frozen=True)
class Case:
    """Everything that decides a run.

    Attributes:
        architecture: a tiny model of `tests/tiny.py`.
        dtype, bits: of its weights; 0 bits are not quantised.
        drafter: the model's own drafter.
        acceptance: share of its drafts that are the right tokens; None for what it drafts by itself.
        drafts: drafts per step.
        layout: as in `stream_generate`; "mixed" takes another one in every step, with branches or without.
        rows: of a pass of layout "tree".
        lookup: what drafts from the text itself: prompt lookup, the memory's drafter without a file, or one that
            proposes the right tokens, most of them.
        tau: with slots, less likely drafts are not submitted; 0 for none.
        exact: whether real rows are those of plain decoding, bit for bit.
        kv_bits, quantized_kv_start: quantised KV cache; 0 bits for an ordinary one.
        window: rows of a rotating cache in place of the ordinary one; 0 for none.
        prefill_step_size: most rows of a pass over the prompt.
        sampling: how tokens are picked.
        biased: ids whose logits are raised by `BIAS`.
        stop: strings that end the text.
        way: one text; turns of one conversation that go on with the same cache; or texts in one batch.
        texts: the text, the turns, or the texts of the batch.
    """

    architecture: str = "llama"
    dtype: DtypeName = "float32"
    bits: int = 0
    drafter: DrafterName = "none"
    acceptance: float | None = None
    drafts: int = 1
    layout: CaseLayout = "plain"
    rows: int = 8
    lookup: LookupName = "none"
    tau: float = 0.0
    exact: bool = False
    kv_bits: int = 0
    quantized_kv_start: int = 0
    window: int = 0
    prefill_step_size: int = 2048
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    biased: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    way: Way = "alone"
    texts: tuple[Text, ...] = (Text((1,)),)

    @property
    def wide(self) -> bool:
        """Whether the model needs sizes that can be quantised."""
        return bool(self.bits or self.kv_bits)

    @property
    def has_slots(self) -> bool:
        """Whether the drafter places slot rows."""
        return self.drafter in SLOT_DRAFTERS

    @property
    def picked_by(self) -> SamplingConfig:
        """`sampling` with the noise of the drafter and the biases."""
        noise: Any = "inverse-cdf" if self.drafter in ("ptp-o", "ptp-c") else "gumbel"
        bias = tuple((token, BIAS) for token in self.biased)
        return dataclasses.replace(self.sampling, noise=noise, logit_bias=bias)

    def to_json(self) -> str:
        """JSON of the fields that are not at their defaults."""
        values = _changed(self) | {"texts": [_changed(text) for text in self.texts]}
        return json.dumps(values, separators=(",", ":"))


def _changed(config: Any) -> dict[str, Any]:
    """{field: value} where a dataclass differs from its defaults; fields without a default always."""
    found = {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if value != default:
            found[one.name] = _changed(value) if dataclasses.is_dataclass(value) else value
    return found


def from_json(text: str) -> Case:
    """The case that `Case.to_json` wrote.

    Raises:
        MTPError: if it is not JSON, or a field is unknown or has a wrong value.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise MTPError(f"--case is not JSON ({error}): quote the whole object") from error
    if not isinstance(values, dict) or not isinstance(values.get("texts"), list) or not values["texts"]:
        raise MTPError('--case must be an object with a list "texts", such as {"texts":[{"prompt":[5]}]}')
    texts = []
    for given in values.pop("texts"):
        if not isinstance(given, dict):
            raise MTPError('--case: every text must be an object, such as {"prompt":[5]}')
        texts.append(from_dict(Text, given, "--case: texts"))
        if not given.get("prompt"):
            raise MTPError("--case: a prompt must have at least one token")
    return dataclasses.replace(from_dict(Case, values, "--case"), texts=tuple(texts))


def choices(name: str) -> tuple[Any, ...]:
    """The values of a field of `Case` that is a Literal."""
    return get_args(get_type_hints(Case)[name])
