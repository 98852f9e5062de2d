"""Converts a checkpoint of the released code for Parallel Token Prediction to a PTP adapter folder (see `ptp_plan`).

The released code trains O-PTP only. What the file does not tell can be given; otherwise the code's defaults are used
and noted in the folder: PEFT's alpha (8), the teacher's sampling, and the length of a completion (16 slots, the first
of which drafts nothing).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.adapter_folder import CONFIG_NAME
from mtp_mlx.convert.adapters.ptp_plan import KNOTS, LINEAR, LORA, is_ptp_checkpoint
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.convert.read.lazy_tensor import LazyTensor
from mtp_mlx.drafters.ptp.config import PTPConfig, TeacherSampling
from mtp_mlx.drafters.ptp.folder import ptp_header, save
from mtp_mlx.drafters.ptp.uniform_embedding import TEETH, UniformEmbeddingName
from mtp_mlx.drafters.ptp.weights import PTPAdapter, new_ptp_adapter
from mtp_mlx.errors import ConversionError, MTPError
from mtp_mlx.files import check_out
from mtp_mlx.model.fingerprint import about_base, base_fingerprint

PEFT_ALPHA = 8.0
COMPLETION_SLOTS = 16
RELEASED_TEACHER = TeacherSampling(temperature=0.7, top_k=50, top_p=0.95)
# Names of embeddings in the released code -> ours.
EMBEDDINGS: dict[str, UniformEmbeddingName] = {
    "binary": "ieee-bits",
    "linear_interpolation": "linear-interpolation",
    "sawtooth": "sawtooth",
}

_UNBUILT = re.compile(r".*\.(u_scale_embed|time_embed|adaLN_modulation)\..*")
_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16}


def write_ptp(
    checkpoint: Checkpoint,
    base: nn.Module,
    base_name: str,
    out: str | Path,
    *,
    force: bool = False,
    alpha: float | None = None,
    embedding: UniformEmbeddingName | None = None,
    teacher: TeacherSampling | None = None,
    slots: int = COMPLETION_SLOTS - 1,
) -> Path:
    """Write the adapter folder `out`, whole or not at all, and return its path.

    Args:
        checkpoint: a student of the released code.
        base: the bare model that the student was trained on.
        base_name: what the folder calls that model.
        force: replace `out` if it is an adapter folder already.
        alpha: of the LoRA (default: what the file says, else PEFT's).
        embedding: of the uniforms (default: what the file says, else what the tensors' shapes say).
        teacher: how the training text was sampled (default: as in the released configurations).
        slots: most drafts behind one position.

    Raises:
        MTPError: `out` exists, not such a checkpoint, parts that cannot be run, or tensors that do not fit the base.
    """
    check_out(Path(out), force=force, mark=CONFIG_NAME, kind="an adapter folder", source=checkpoint.path)
    if not is_ptp_checkpoint(checkpoint):
        raise ConversionError(
            f"{checkpoint.path}: not a student of Parallel Token Prediction: it needs low-rank factors and an "
            "embedding of uniforms"
        )
    notes: list[str] = []
    low_rank = _low_rank(checkpoint)
    kind, embedded = _embedding(checkpoint, embedding, notes)
    config = PTPConfig(
        variant="o",
        embedding=kind,
        knots=embedded["weight"].shape[0] if kind == "linear-interpolation" else 3,
        slots=slots,
        rank=low_rank[next(iter(low_rank))].shape[1],
        alpha=_alpha(checkpoint, alpha, notes),
        target_modules=tuple(sorted({path.rsplit(".", 2)[-2] for path in low_rank})),
        teacher=teacher or RELEASED_TEACHER,
    )
    notes += [] if teacher else ["the teacher's sampling is that of the released configurations"]
    adapter = new_ptp_adapter(base, config)
    _fill(adapter, checkpoint.path, low_rank, embedded)
    source = {
        "family": "released code of arXiv 2512.21323",
        "files": ", ".join(checkpoint.files),
        "tensors left out": len(checkpoint.tensors) - len(low_rank) - len(embedded),
        "notes": "; ".join(notes) or "none",
    }
    about = {"source": source, **about_base(base)}
    header = ptp_header(config, base_name, base_fingerprint(base), **about)
    stored = next(t.dtype for name, t in checkpoint.tensors.items() if LORA.fullmatch(name))
    save(Path(out), adapter, header, _DTYPES.get(stored, mx.float32))
    return Path(out)


def _low_rank(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """`<layer>.down` [in, r] and `<layer>.up` [r, out] of every adapted layer.

    Raises:
        ConversionError: a factor without its partner, different ranks, or parts that cannot be run.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        unbuilt = _UNBUILT.fullmatch(name)
        if unbuilt:
            raise ConversionError(
                f"{checkpoint.path}: it has {name}; students with {unbuilt[1]} cannot be run, nothing was written"
            )
        match = LORA.fullmatch(name)
        if match:
            found[f"{match[1]}.{'down' if match[2] == 'A' else 'up'}"] = tensor
    layers = {path.rsplit(".", 1)[0] for path in found}
    alone = sorted(path for path in layers if f"{path}.down" not in found or f"{path}.up" not in found)
    if alone:
        raise ConversionError(f"{checkpoint.path}: {alone[0]} has only one of its two low-rank factors")
    ranks = {found[f"{path}.down"].shape[0] for path in layers} | {
        found[f"{path}.up"].shape[-1] for path in layers
    }
    if len(ranks) > 1:
        raise ConversionError(
            f"{checkpoint.path}: its low-rank factors have the ranks {sorted(ranks)}; all must have the same"
        )
    return {path: mx.array(tensor.float32()).T for path, tensor in found.items()}


def _embedding(
    checkpoint: Checkpoint, asked: UniformEmbeddingName | None, notes: list[str]
) -> tuple[UniformEmbeddingName, dict[str, mx.array]]:
    """The embedding of uniforms: its kind, and its tensors by our names.

    Raises:
        ConversionError: an embedding that is not supported, or one of two kinds that its shape does not tell apart.
    """
    tensors: dict[str, LazyTensor] = {}
    linear = False
    for name, tensor in checkpoint.tensors.items():
        match = LINEAR.fullmatch(name)
        if match or KNOTS.fullmatch(name):
            linear = linear or bool(match)
            tensors[match[1] if match else "weight"] = tensor
    said = _hyper_parameter(checkpoint.values, "adapter_name")
    if asked is None and said is not None and said not in EMBEDDINGS:
        raise ConversionError(
            f"{checkpoint.path}: uniforms embedded as {said!r} are not supported; nothing was written"
        )
    kind = asked or EMBEDDINGS.get(str(said))
    if kind is None and not linear and tensors["weight"].shape[0] == TEETH:
        raise ConversionError(
            f"{checkpoint.path}: {TEETH} vectors may be knots to interpolate between or bins to round to, and the "
            "file does not say which; bins are not supported, so give `embedding` 'linear-interpolation' if these "
            "are knots"
        )
    if kind is None:
        kind = "ieee-bits" if linear else "linear-interpolation"
        notes.append(f"the embedding of uniforms is {kind}, by the tensors' shapes")
    if linear == (kind == "linear-interpolation"):
        raise ConversionError(
            f"{checkpoint.path}: its embedding of uniforms does not have the tensors of '{kind}'"
        )
    return kind, {key: mx.array(tensor.float32()) for key, tensor in tensors.items()}


def _alpha(checkpoint: Checkpoint, asked: float | None, notes: list[str]) -> float:
    """The LoRA's alpha."""
    said = _hyper_parameter(checkpoint.values, "lora_alpha")
    if asked is not None or isinstance(said, int | float):
        return float(said if asked is None else asked)
    notes.append(f"the file does not give LoRA's alpha: PEFT's default {PEFT_ALPHA:g} was used")
    return PEFT_ALPHA


def _hyper_parameter(values: Mapping[str, Any], name: str) -> Any:
    """The value of that name anywhere in Lightning's hyper-parameters, or None."""
    stack: list[Any] = [values.get("hyper_parameters")]
    while stack:
        item = stack.pop()
        if isinstance(item, Mapping):
            if item.get(name) is not None:
                return item[name]
            stack += item.values()
    return None


def _fill(
    adapter: PTPAdapter, path: Path, low_rank: dict[str, mx.array], embedded: dict[str, mx.array]
) -> None:
    """Puts the tensors into `adapter`. The code has no slot without a uniform: at temperature 0 it takes u = 1/2.

    Raises:
        ConversionError: tensors that do not fit the base.
    """
    tensors = {f"low_rank.{name}": value for name, value in low_rank.items()}
    tensors |= {f"u_embed.{name}": value for name, value in embedded.items()}
    size = embedded["weight"].shape[-1 if "bias" not in embedded else 0]
    try:
        adapter.load_tensors({**tensors, "u_embed.none": mx.zeros((size,))})
    except MTPError as error:
        raise ConversionError(f"{path}: {error}") from error
    adapter.u_embed.none = adapter.u_embed.carried(mx.array([0.5]))[0]
