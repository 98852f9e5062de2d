"""What tells a base model apart in any precision: a fingerprint of its norms, and a sample of its weights.

The fingerprint is short and names a model exactly, but a fine-tune merged into the linear layers leaves it as it is.
The sample notices that, see `mtp_mlx.model.base_sample`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mtp_mlx.errors import MTPError
from mtp_mlx.model.base_sample import RUN, BaseSample
from mtp_mlx.model.precision import bare, weight_format
from mtp_mlx.model.seams import Seams, embedding_shape, find_seams, is_recurrent

MOST_LAYERS = 48  # layers that are sampled
_KNOWN = "_known_sample"  # attribute of a model, see `sampled_through`
# Largest rounding error of a 4-bit and of an 8-bit float, relative to the largest weight nearby: e2m1 has no value
# between 4 and 6, and larger ones are clipped; e4m3 has three bits after the first.
_FLOAT4_ERROR, _FLOAT8_ERROR = 1 / 3, 1 / 16
_UNIT = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11, mx.float32: 0.0}  # relative rounding error of scales


def base_fingerprint(model: nn.Module) -> str:
    """16 hex digits that identify a base model, whatever its precision.

    It is a hash of the model type, the vocabulary size, the hidden size and every normalisation weight rounded to
    bfloat16: quantising or casting a model does not change these, fine-tuning does.

    Raises:
        MTPError: if the model lacks a seam.
    """
    seams = find_seams(model)
    trunk = seams.trunk
    digest = hashlib.sha256()
    digest.update(f"{getattr(model, 'model_type', '?')} {embedding_shape(_base_embedding(seams))}".encode())
    for name, module in sorted(trunk.named_modules(), key=lambda item: item[0]):
        if "norm" in name.rsplit(".", 1)[-1] and "weight" in module:
            rounded = module["weight"].astype(mx.bfloat16).astype(mx.float32)
            digest.update(name.encode())
            digest.update(np.array(rounded).tobytes())
    return digest.hexdigest()[:16]


def _base_embedding(seams: Seams) -> nn.Module:
    return cast(nn.Module, getattr(seams.embedding, "base", seams.embedding))


def fingerprint_of(model: Any) -> tuple[str | None, str]:
    """(fingerprint of a bare model, ""), or (None, the reason why it has none)."""
    try:
        return base_fingerprint(model), ""
    except MTPError as error:
        return None, str(error)


# --- the sample ---------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """The sampled weights of a layer: see `BaseSample`."""

    name: str
    form: str
    values: np.ndarray  # [RUN] float32
    half_step: float


def sample_base(model: nn.Module) -> BaseSample:
    """A sample of the model's linear layers, the same layers, rows and columns in any precision.

    Takes a few milliseconds once the weights are in memory: a single row of each layer is dequantised. Lazy layers
    are read whole and stay in memory: see `sampled_through`.

    Raises:
        MTPError: if the model lacks a seam.
    """
    known = getattr(model, _KNOWN, None)
    if isinstance(known, BaseSample):
        return known
    return sample_of(_run(name, layer) for name, layer in sampled_layers(model))


def about_base(model: nn.Module) -> dict[str, Any]:
    """What the header of an adapter folder says of a bare base model beside its name and fingerprint.

    Raises:
        MTPError: if the model lacks a seam.
    """
    return {"base_sample": sample_base(model), "base_recurrent": is_recurrent(make_prompt_cache(model))}


def sample_lazily(model: nn.Module) -> BaseSample:
    """As `sample_base`, for a model with lazy weights that is not used any more: keeps one layer in memory at a time.

    Raises:
        MTPError: if the model lacks a seam.
    """

    def runs() -> Iterator[Run]:
        for name, layer in sampled_layers(model):
            yield _run(name, layer)
            layer.clear()

    return sample_of(runs())


@contextmanager
def sampled_through(model: nn.Module, again: Callable[[], nn.Module]) -> Iterator[None]:
    """Meanwhile `sample_base` of a lazy model leaves its weights unread: it samples a second load, thrown away then.

    Args:
        again: loads the same model, lazily too.
    """
    setattr(model, _KNOWN, sample_lazily(again()))
    try:
        yield
    finally:
        delattr(model, _KNOWN)


def sample_of(runs: Iterable[Run]) -> BaseSample:
    """The sample that consists of these runs."""
    found = list(runs)
    values = np.array([run.values for run in found], dtype=np.float32).reshape(-1, RUN)
    values = np.where(np.abs(values) < np.finfo(np.float16).max, values, np.nan)
    half_steps = np.array([run.half_step for run in found], dtype=np.float32)
    form = "; ".join(sorted({run.form for run in found})) or "no linear layers"
    layers = hashlib.sha256("\n".join(run.name for run in found).encode()).hexdigest()[:8]
    return BaseSample(form, values.astype(np.float16), half_steps.astype(np.float16), layers)


def sampled_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path below the trunk, layer) of the sampled layers: chosen by their names, spread over depths and kinds."""
    linears = {_without_wrappers(name): bare(layer) for name, layer in find_seams(model).linears.items()}
    return [(name, linears[name]) for name in sorted(sorted(linears, key=_hash)[:MOST_LAYERS])]


def _without_wrappers(name: str) -> str:
    """The path of a layer as it is in a model that is not attached; a layer may be wrapped twice."""
    while name.endswith(".base"):
        name = name.removesuffix(".base")
    return name


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _run(name: str, layer: nn.Module) -> Run:
    """`RUN` neighbouring weights of a row that the layer's name decides; fewer if the layer is narrower."""
    weight, chosen = layer["weight"], _hash(name)
    row = chosen % weight.shape[0]
    if "scales" in layer:
        return _quantised_run(name, layer, row, chosen)
    first = _first(weight.shape[1], chosen)
    values = np.array(weight[row, first : first + RUN].astype(mx.float32))
    return Run(name, weight_format(layer), _padded(values), 0.0)


def _first(width: int, chosen: int) -> int:
    """First column of a run: a multiple of RUN, so that a run lies within one quantisation group."""
    return (chosen >> 20) % max(width // RUN, 1) * RUN


def _quantised_run(name: str, layer: nn.Module, row: int, chosen: int) -> Run:
    mode, biases = getattr(layer, "mode", "affine"), layer.get("biases")
    whole = mx.dequantize(
        layer["weight"][row : row + 1],
        layer["scales"][row : row + 1],
        None if biases is None else biases[row : row + 1],
        layer.group_size,
        layer.bits,
        mode=mode,
    )[0]
    first = _first(whole.shape[0], chosen)
    values = np.array(whole[first : first + RUN].astype(mx.float32))
    largest, group = float(np.abs(values).max()), first // layer.group_size
    if biases is None:
        error = largest * (_FLOAT4_ERROR if layer.bits == 4 else _FLOAT8_ERROR)
        return Run(name, weight_format(layer), _padded(values), error)
    step, bias = (float(layer[part][row, group].item()) for part in ("scales", "biases"))
    levels = np.round((values - bias) / step) if step else np.zeros_like(values)
    # A weight beyond the first or last level was clipped, so its error has no bound.
    inner = np.where((levels > 0) & (levels < 2**layer.bits - 1), values, np.nan)
    rounding = _UNIT.get(layer["scales"].dtype, 0.0) * (abs(bias) + largest)
    return Run(name, weight_format(layer), _padded(inner), 0.525 * abs(step) + rounding)


def _padded(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, np.full(RUN - len(values), np.nan, np.float32)])
