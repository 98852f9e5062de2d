"""A sample of a base model's weights, which tells whether two copies of a model are roundings of the same weights.

A fine-tune that is merged into the weights may leave every norm as it was, and it changes each weight by less than
4-bit rounding does: neither norms nor a distance between weights can notice it. Rounding, however, is bounded. The
original weight lies within half a quantisation step of every copy's, so two copies of one base differ nowhere by more
than the sum of their halves. Of a fine-tuned model a share of the weights does, as large as the update over the step.

Measured on SmolLM2-135M, float32, with a LoRA of 1.7 % of the weights' norm merged: 75 % of the weights of a bfloat16
copy lie outside, 41 % of an 8-bit and 1.0 % of a 4-bit one (8 % and 0.2 % if they were quantised from bfloat16, whose
scales are rounded more). Of the base's own copies none does. Reading a sample needs no mlx.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

RUN = 32  # neighbouring weights of a layer that are sampled: no more than a quantisation group has
MOST_OUTSIDE = 0.003  # share of the weights outside the bounds that is put down to chance
MOST_MOVED = (
    0.05  # of two copies in the same quantised format: rounding of the original may turn a weight over
)
# Of RUN neighbours, bfloat16 weights have 31.5 different values on average, weights that had 8 bits before 29.8.
LEAST_DISTINCT = 30.7
_BFLOAT16, _FLOAT16 = 2.0**-8, 2.0**-11  # relative rounding errors
_TINY = 1e-7  # absolute rounding error of float16

Verdict = Literal["same", "may differ", "differs"]


@dataclass(frozen=True, eq=False)
class BaseSample:
    """Sampled weights of a base model, as they are after dequantising.

    Attributes:
        form: the format of the weights, in words.
        values: [N, RUN] float16, a run of each sampled layer; NaN where the rounding error has no bound.
        half_steps: [N] float16, the largest rounding error of a run's quantised weights; 0 if they are not quantised.
        layers: 8 hex digits that depend on the names of the sampled layers; "" in folders of earlier versions.
    """

    form: str
    values: np.ndarray
    half_steps: np.ndarray
    layers: str = ""

    def to_json(self) -> dict[str, Any]:
        """As the header of an adapter folder holds it: 4.3 kB for 48 layers."""
        raw = np.concatenate([self.half_steps[:, None], self.values], axis=1).astype("<f2").tobytes()
        weights = base64.b64encode(raw).decode("ascii")
        return {"form": self.form, **({"layers": self.layers} if self.layers else {}), "weights": weights}

    @staticmethod
    def from_json(raw: dict[str, Any]) -> BaseSample:
        """What `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        try:
            stored = np.frombuffer(base64.b64decode(raw["weights"], validate=True), dtype="<f2")
        except binascii.Error as error:
            raise ValueError(f"the base's sampled weights are not base64 ({error})") from error
        table = stored.reshape(-1, RUN + 1)
        return BaseSample(str(raw["form"]), table[:, 1:], table[:, 0], str(raw.get("layers", "")))

    def key(self) -> str:
        """16 hex digits that depend on all of it."""
        return hashlib.sha256(repr(self.to_json()).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BaseSample) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    @property
    def quantised(self) -> bool:
        """Whether any of the weights is quantised."""
        return bool(np.any(self.half_steps > 0))

    def comparable(self, other: BaseSample) -> bool:
        """Whether this and `other` are of the same layers, as far as is known: other names, other weights."""
        known = "" not in (self.layers, other.layers)
        return self.values.shape == other.values.shape and (self.layers == other.layers or not known)

    def against(self, other: BaseSample) -> Verdict:
        """Whether this and `other` are copies of the same weights.

        "differs" is certain: neither was ever rounded to 8 bits or fewer. "may differ" leaves it open whether one was
        fine-tuned, or quantised by a method that does more than round to the nearest (AWQ, DWQ, GPTQ). It also stands
        for samples that cannot be compared: another version of mlx-lm may have named or joined layers in another
        way. A fine-tune that is small against the rounding of both is "same".
        """
        if not self.comparable(other):
            return "may differ"
        if self.share_outside(other) <= (MOST_MOVED if self._same_format(other) else MOST_OUTSIDE):
            return "same"
        return "differs" if self._original and other._original else "may differ"

    def share_outside(self, other: BaseSample) -> float:
        """Share of the sampled weights in which this and `other` differ by more than rounding explains.

        Two copies in the same quantised format should be equal, so only the rounding of their scales is allowed for.
        """
        one, two = (sample.values.astype(np.float32) for sample in (self, other))
        known = ~(np.isnan(one) | np.isnan(two))
        bound = (_precision(one) + _precision(two)) * np.fmax(np.abs(one), np.abs(two)) + _TINY
        if not self._same_format(other):
            bound = bound + (self.half_steps + other.half_steps).astype(np.float32)[:, None]
        with np.errstate(invalid="ignore"):
            outside = known & (np.abs(one - two) > bound)
        return float(outside.sum() / max(known.sum(), 1))

    def _same_format(self, other: BaseSample) -> bool:
        return self.quantised and self.form == other.form

    @property
    def _original(self) -> bool:
        """Whether the weights are neither quantised nor dequantised."""
        if self.quantised:
            return False
        whole = [row for row in self.values if not np.isnan(row).any()]
        return bool(whole) and float(np.mean([len(np.unique(row)) for row in whole])) >= LEAST_DISTINCT


def _precision(values: np.ndarray) -> float:
    """The relative rounding error of float values: that of bfloat16 where all of them are bfloat16 numbers."""
    bits = np.ascontiguousarray(values[~np.isnan(values)], dtype=np.float32).view(np.uint32)
    return _BFLOAT16 if not np.any(bits & 0xFFFF) else _FLOAT16
