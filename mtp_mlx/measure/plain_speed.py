"""The last measured speed of plain decoding, by model and length of the prompt, so that a run can show its speed-up.

Kept in `plain_speed.json` in the cache folder; written by every plain run that is long enough, and by `bench`. It is
a convenience: a damaged file counts as no measurement, and one that cannot be written is warned of once.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import mlx.core as mx

from mtp_mlx.files import cache_dir, keep_if_possible, kept_file, write_text
from mtp_mlx.models import EMBEDDED

FEWEST_TOKENS = 32  # shorter runs say little about speed
SHORT_PROMPT = 512  # tokens; speeds after shorter prompts are compared with each other, longer ones by octave
_FILE_NAME = "plain_speed.json"


def remember(
    model: str, tok_per_s: float, n_tokens: int, *, quantize: int | None = None, context: int = 0
) -> bool:
    """Keeps the speed of a plain run. Returns False if the run was too short or the file cannot be written.

    Args:
        model: as the user named it: embedded model, folder or hub id.
        tok_per_s: tokens per second of the run.
        n_tokens: its length.
        quantize: bits that the embedded model was quantised to while loading.
        context: tokens of the prompt; a long one makes every token slower.
    """
    if n_tokens < FEWEST_TOKENS or tok_per_s <= 0:
        return False
    speeds = _read()
    speeds[_key(model, quantize, context)] = round(tok_per_s, 3)
    text = json.dumps(speeds, indent=2, sort_keys=True) + "\n"
    return keep_if_possible(lambda: write_text(cache_dir() / _FILE_NAME, text), "plain speeds")


def recall(model: str, *, quantize: int | None = None, context: int = 0) -> float | None:
    """Tokens per second of plain decoding after a prompt of about this length, or None if never measured."""
    return _read().get(_key(model, quantize, context))


def longer_than(context: int) -> int:
    """The number of tokens, 512, 1,024, 2,048, ..., below which prompts are compared with one of `context`."""
    return SHORT_PROMPT << (context // SHORT_PROMPT).bit_length()


def device_name() -> str:
    """The chip that MLX computes on, such as "Apple M2 Max", or "cpu x86_64" if it has no name."""
    name = dict(mx.device_info()).get("device_name") if mx.default_device() == mx.Device(mx.gpu) else None
    return str(name) if name else f"cpu {platform.machine()}"


def _key(model: str, quantize: int | None, context: int) -> str:
    folder = Path(model).expanduser()
    name = str(folder.resolve()) if model not in EMBEDDED and folder.is_dir() else model
    bits = f" {quantize} bits" if quantize else ""
    shorter = longer_than(context)
    length = "" if shorter == SHORT_PROMPT else f" | prompt below {shorter}"
    return f"{name}{bits} | {device_name()}{length}"


def _read() -> dict[str, float]:
    file = kept_file(_FILE_NAME)
    if file is None:
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): float(value) for key, value in values.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
