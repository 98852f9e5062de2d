"""Reading the JSON of a request: known fields are checked, and the names of unknown ones are kept, to be counted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.errors import MTPError
from mtp_mlx.serve.request import RequestError

MOST_STOPS = 16
LONGEST_STOP = 1000  # characters
MOST_BIASES, MOST_BIAS = 1024, 100


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        RequestError: if the body is not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the body is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """The fields of a JSON object, taken one by one. A field that is null counts as missing.

    Args:
        values: the object.
        ignored: names that have no effect here and are accepted.

    Raises:
        RequestError: if a name is not valid Unicode.
    """

    def __init__(self, values: dict[str, Any], ignored: frozenset[str] = frozenset()) -> None:
        for name in values:
            checked_text(name, "the name of a field")
        self._left = {k: v for k, v in values.items() if v is not None and k not in ignored}

    def take(self, name: str, default: Any = None) -> Any:
        """Take a field of any type."""
        return self._left.pop(name, default)

    def text(self, name: str, default: str | None = None) -> str | None:
        """Take a string."""
        value = self._left.pop(name, default)
        return value if value is None else checked_text(value, name)

    def flag(self, name: str, default: bool = False) -> bool:
        """Take a boolean."""
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false", field=name)
        return value

    def integer(
        self, name: str, default: int | None = None, minimum: int = 0, most: int = 2**64
    ) -> int | None:
        """Take an integer in [minimum, most]."""
        value = self._left.pop(name, default)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise RequestError(f"{name} must be an integer", field=name)
        if not minimum <= value <= most:
            bounds = f"at least {minimum}" if most >= 2**64 else f"between {minimum} and {most}"
            raise RequestError(f"{name} must be {bounds}, not {value}", field=name)
        return value

    def number(self, name: str, default: float) -> float:
        """Take a finite number."""
        value = self._left.pop(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise RequestError(f"{name} must be a number", field=name)
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise RequestError(f"{name} must be a finite number", field=name)
        return value

    def stops(self, name: str) -> tuple[str, ...]:
        """Take stop strings: one string or a list of them."""
        value = self._left.pop(name, [])
        strings = [value] if isinstance(value, str) else value
        if not isinstance(strings, list) or len(strings) > MOST_STOPS:
            raise RequestError(
                f"{name} must be a string or a list of at most {MOST_STOPS} strings", field=name
            )
        for string in strings:
            if not checked_text(string, name) or len(string) > LONGEST_STOP:
                raise RequestError(
                    f"{name}: a stop string must have 1 to {LONGEST_STOP} characters", field=name
                )
        return tuple(strings)

    def refuse(self, name: str, why: str, *harmless: Any) -> None:
        """Refuse a field by name unless its value is one of the harmless ones."""
        value = self._left.pop(name, None)
        if value is not None and value not in harmless:
            raise RequestError(f"{name} is not supported: {why}", field=name)

    def ignore(self, name: str) -> None:
        """Count a part of a field among those that have no effect."""
        self._left[name] = True

    def left(self) -> tuple[str, ...]:
        """Names of the fields that nobody took; they have no effect."""
        return tuple(sorted(self._left))

    def sampling(self, default: SamplingConfig, seed: int) -> SamplingConfig:
        """Take all sampling fields.

        Args:
            default: for fields that are missing.
            seed: if the request has none.

        Raises:
            RequestError: if a value is out of range.
        """
        try:
            return replace(
                default,
                temperature=self.number("temperature", default.temperature),
                top_k=max(0, self._whole("top_k", default.top_k, minimum=-1)),  # elsewhere -1 turns it off
                top_p=self.number("top_p", default.top_p),
                min_p=self.number("min_p", default.min_p),
                **self._xtc(default),
                repetition_penalty=self.number("repetition_penalty", default.repetition_penalty),
                repetition_context_size=self._context("repetition_context_size"),
                presence_penalty=self.number("presence_penalty", default.presence_penalty),
                presence_context_size=self._context("presence_context_size"),
                frequency_penalty=self.number("frequency_penalty", default.frequency_penalty),
                frequency_context_size=self._context("frequency_context_size"),
                seed=self._whole("seed", seed, 2**64 - 1, -(2**63)) % 2**64,  # OpenAI's are signed
                logit_bias=self._biases("logit_bias"),
            )
        except MTPError as error:
            raise RequestError(str(error)) from None

    def _xtc(self, default: SamplingConfig) -> dict[str, Any]:
        """Take XTC's fields; a threshold has no meaning where nothing is dropped, as in mlx-lm."""
        probability = self.number("xtc_probability", default.xtc_probability)
        threshold = self.number("xtc_threshold", default.xtc_threshold)
        used = threshold if probability else default.xtc_threshold
        return {"xtc_probability": probability, "xtc_threshold": used}

    def _biases(self, name: str) -> tuple[tuple[int, float], ...]:
        """Take biases of logits: an object whose names are token ids."""
        value = self._left.pop(name, {})
        if not isinstance(value, dict) or len(value) > MOST_BIASES:
            raise RequestError(f"{name} must be an object of at most {MOST_BIASES} token ids", field=name)
        found: dict[int, float] = {}
        for token, bias in value.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise RequestError(f"{name}: {token!r} is no token id", field=name)
            if not isinstance(bias, (int, float)) or isinstance(bias, bool) or not abs(bias) <= MOST_BIAS:
                raise RequestError(
                    f"{name}: the bias of {token} must be a number from -{MOST_BIAS} to {MOST_BIAS}",
                    field=name,
                )
            found[int(token)] = float(bias)
        return tuple(found.items())

    def _whole(self, name: str, default: int, most: int = 2**31, minimum: int = 0) -> int:
        value = self.integer(name, default, minimum, most)
        assert value is not None
        return value

    def _context(self, name: str) -> int:
        value = self.integer(name, 20, minimum=1, most=4096)
        assert value is not None
        return value


def checked_text(value: Any, name: str) -> str:
    """Return `value` if it is a valid Unicode string (JSON can encode lone surrogates)."""
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string", field=name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            f"{name} contains a lone surrogate, which is not valid Unicode", field=name
        ) from None
    return value
