"""Plans the conversion of a checkpoint's heads: recognises them, checks every tensor, finds copies of the trunk's.

Nothing is converted here and mlx is not needed. The only weights read are possible copies of the trunk's, and a few
norms if nothing else tells how the file stores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from mtp_mlx.adapter_folder import sidecar
from mtp_mlx.convert.heads.families import Found, find_cascade
from mtp_mlx.convert.heads.other_forms import find_lora, find_medusa, find_meta
from mtp_mlx.convert.heads.packed import dequantised_note, described, parts_of, unpacked
from mtp_mlx.convert.heads.targets import ADD_ONE, AS_IT_IS, SWAP, HeadPlan, Target
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.convert.read.lazy_tensor import FLOATS, LazyTensor
from mtp_mlx.drafters.heads.convention import MOST_HEADS, HeadConvention
from mtp_mlx.errors import ConversionError

# Names of a trunk's embedding and LM head.
_TRUNK = {
    "embed_tokens": (
        "model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "backbone.embeddings.weight",
        "model.word_embeddings.weight",
    ),
    "lm_head": ("lm_head.weight", "language_model.lm_head.weight"),
}
_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
_NO_CONFIG = ("quantization_config", "text_config", "vision_config", "id2label", "label2id", "auto_map")
_CHUNK = 1 << 24
# What a configuration with wrong types or impossible numbers raises further down.
_MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
_SHOWN = 20
_BETWEEN = 0.5  # means of q and k norms: stored around zero below, as plain gains above


@dataclass(frozen=True)
class Overrides:
    """How heads are stored and run; "auto" is their family's convention.

    Attributes:
        head_norms: how the file stores its norms: "plain", "zero-centred", or "mixed": around zero in the decoder
            layers alone.
        head_order: which half its fuse weights begin with: "embedding" or "hidden".
        head_hidden: the state of the trunk that the first draft takes: "post-norm" or "pre-norm".
        head_recycled: the state that each further draft takes: "normed" or "raw" (a head's own, after or before its
            output norm), or "trunk".
    """

    head_norms: str = "auto"
    head_order: str = "auto"
    head_hidden: str = "auto"
    head_recycled: str = "auto"

    @property
    def given(self) -> list[str]:
        """Names of the fields that are not "auto"."""
        return [field.name for field in fields(self) if getattr(self, field.name) != "auto"]


AS_FAMILY = Overrides()


def find_heads(checkpoint: Checkpoint) -> Found | None:
    """The heads of `checkpoint`, or None if it has none.

    Raises ConversionError: heads of an unsupported kind, or heads that config.json announces but no file holds.
    """
    config = checkpoint.text_config
    tensors = checkpoint.tensors
    try:
        found = (
            find_cascade(tensors.keys(), config)
            or find_meta(tensors, config)
            or find_medusa(tensors, config)
            or find_lora(tensors, config)
        )
    except ConversionError as error:  # what raised it does not know the path
        raise ConversionError(f"{checkpoint.path}: {error}") from error
    except _MISFITS as error:
        raise _undescribed(checkpoint, error) from error
    if found is not None and found.drafts > MOST_HEADS:
        raise _undescribed(checkpoint, ValueError(f"{found.drafts} drafts in a step"))
    announced = _announced(config)
    if found is None and announced:
        raise ConversionError(
            f"{checkpoint.path}: {checkpoint.config_name} announces {announced} MTP head(s), but none is in the "
            "file; they were dropped when this copy was made, use the original checkpoint"
        )
    return found


def heads_beside_trunk(checkpoint: Checkpoint, wanted: bool = True) -> Found | None:
    """The heads among the tensors of a checkpoint, or None: an earlier conversion may have moved them to `mtp/`.

    Args:
        wanted: whether they will be converted. If not, heads that cannot be used count as none.

    Raises ConversionError: as `find_heads`, if they are wanted.
    """
    if sidecar(checkpoint.path) is not None:
        return None
    try:
        return find_heads(checkpoint)
    except ConversionError:
        if wanted:
            raise
        return None


def _undescribed(checkpoint: Checkpoint, error: Exception) -> ConversionError:
    return ConversionError(
        f"{checkpoint.path}: {checkpoint.config_name or 'its configuration'} does not describe such a model "
        f"({error!r}); use the model's own config.json"
    )


def _announced(config: Mapping[str, Any]) -> int:
    return next((int(config[key]) for key in _COUNTS if isinstance(config.get(key), int)), 0)


def plan_heads(checkpoint: Checkpoint, found: Found | None, overrides: Overrides = AS_FAMILY) -> HeadPlan:
    """How the heads of `checkpoint` will be converted.

    Args:
        found: its heads, as `find_heads` found them.
        overrides: conventions to use instead of the family's.

    Raises ConversionError: no heads, or tensors that do not fit (one message lists them all).
    """
    if found is None:
        raise ConversionError(
            f"{checkpoint.path}: holds no MTP heads of a known kind ({len(checkpoint.tensors)} tensors, model_type "
            f"{checkpoint.text_config.get('model_type')!r}); train some with 'mtp-mlx train'; "
            "docs/checkpoints.md lists the kinds that are known"
        )
    found, notes = _settle_norms(checkpoint, found, overrides.head_norms)
    found, told = _overridden(checkpoint, found, overrides)
    notes += told
    try:
        copies, dropped, convention = _copies(checkpoint, found)
        targets, packings = unpacked([*found.targets, *copies], checkpoint.tensors)
    except ConversionError as error:  # what raised it does not know the path
        raise ConversionError(f"{checkpoint.path}: {error}") from error
    except _MISFITS as error:
        raise _undescribed(checkpoint, error) from error
    _check(checkpoint, found, targets)
    notes += dequantised_note(targets)
    announced = _announced(checkpoint.text_config)
    if announced and found.convention.kind == "cascade" and announced != found.count:
        notes.append(
            f"the configuration announces {announced} head(s), the file holds {found.count}: all are taken"
        )
    # Keys with an underscore are private to the program that wrote the file, such as the folder it was in.
    config = {
        key: value for key, value in found.config.items() if key not in _NO_CONFIG and not key.startswith("_")
    }
    return HeadPlan(
        title=found.title,
        convention=convention,
        count=found.count,
        targets=targets,
        blocks=found.blocks,
        dropped=dropped,
        notes=notes,
        model_config=config,
        drafts=found.drafts,
        quantization=described(packings),
    )


# --- norms --------------------------------------------------------------------------------------------------


def _settle_norms(checkpoint: Checkpoint, found: Found, norms: str) -> tuple[Found, list[str]]:
    """`found` with the form of its norms settled, and a note that says why."""
    if not found.convention.zero_centred_norms and norms in ("auto", "plain"):
        return found, []
    why = "as asked for"
    if norms == "auto":
        zero_centred, why = _zero_centred(checkpoint, found)
        norms = "zero-centred" if zero_centred else "plain"
    convention = replace(
        found.convention, zero_centred_norms=norms == "zero-centred", mixed_norms=norms == "mixed"
    )
    targets = [_with_norm(target, norms) for target in found.targets]
    return replace(found, convention=convention, targets=targets), [
        f"norms are stored {_STORED[norms]} ({why})"
    ]


_STORED = {
    "zero-centred": "around zero, 1 is added to each",
    "plain": "as plain gains already, nothing is added",
    "mixed": "around zero in the decoder layers, where 1 is added, and as plain gains elsewhere",
}


def _with_norm(target: Target, norms: str) -> Target:
    is_norm = len(target.shape) == 1 and "norm" in target.name and target.step in (ADD_ONE, AS_IT_IS)
    add = norms == "zero-centred" or (norms == "mixed" and ".block." in target.name)
    return replace(target, step=ADD_ONE if add else AS_IT_IS) if is_norm else target


def _zero_centred(checkpoint: Checkpoint, found: Found) -> tuple[bool, str]:
    """Whether the heads' norms are still stored around zero, and why that is believed.

    mlx-lm's conversion adds 1 to the trunk's norms and moves the axes of its convolutions, but ignores heads, whose
    norms may then have either form.
    """
    tensors = checkpoint.tensors
    convolutions = [
        t.shape for name, t in tensors.items() if name.endswith("conv1d.weight") and len(t.shape) == 3
    ]
    gains = [name for name in tensors if name.endswith((".q_norm.weight", ".k_norm.weight"))]
    head = _mean(tensors, [name for name in gains if name in found.owned])
    if "zero_centred_norms" in found.convention.unsettled and head is not None:
        return head < _BETWEEN, f"mean of the q and k norms {head:.2f}; only drafts can tell for sure"
    if not convolutions:
        return True, "the family's own form; there are no convolutions that could tell otherwise"
    if convolutions[0][-1] != 1:
        return True, "the trunk's convolutions have the original layout"
    trunk = _mean(tensors, [name for name in gains if name not in found.owned])
    if head is None or trunk is None:
        raise ConversionError(
            f"{checkpoint.path}: mlx-lm converted the trunk, and nothing in the file tells whether the heads' norms "
            "were converted too; give `head_norms` plain or `head_norms` zero-centred"
        )
    why = f"the trunk is mlx-lm's; mean of q and k norms {trunk:.2f} in the trunk, {head:.2f} in the heads"
    return abs(head - trunk) > abs(head + 1 - trunk), why


def _mean(tensors: Mapping[str, LazyTensor], names: list[str]) -> float | None:
    return float(np.mean([tensors[name].float32().mean() for name in names])) if names else None


def _overridden(checkpoint: Checkpoint, found: Found, overrides: Overrides) -> tuple[Found, list[str]]:
    """`found` with the order and states that `overrides` gives, and notes about what that changed."""
    order, hidden, recycled = overrides.head_order, overrides.head_hidden, overrides.head_recycled
    convention, targets, notes = found.convention, found.targets, []
    if {order, hidden, recycled} != {"auto"} and convention.kind != "cascade":
        raise ConversionError(
            f"{checkpoint.path}: {found.title} heads have no fuse weight, so neither its order nor hidden states can "
            "be chosen"
        )
    if order not in ("auto", convention.stored_order):
        convention = replace(convention, stored_order=order)
        fuse = SWAP if order == "hidden" else AS_IT_IS
        targets = [replace(t, step=fuse) if t.name.endswith(".fuse.weight") else t for t in targets]
        notes.append(f"fuse weights are stored {order}-first (as asked for)")
    if hidden not in ("auto", convention.first_hidden):
        convention = replace(convention, first_hidden=hidden)
        notes.append(f"heads take the {hidden} state (as asked for)")
    if recycled not in ("auto", convention.recycled_hidden):
        convention = replace(convention, recycled_hidden=recycled)
        notes.append(f"the next draft takes the {recycled} state (as asked for)")
    return replace(found, convention=convention, targets=targets), notes


# --- copies of the trunk's embedding and LM head ------------------------------------------------------------


def _copies(
    checkpoint: Checkpoint, found: Found
) -> tuple[list[Target], list[tuple[str, str]], HeadConvention]:
    """Embeddings and LM heads beside the heads.

    Returns the targets of those that are the heads' own; (stored name, trunk's name) of those that equal the trunk's
    byte for byte and are left out; and the convention that says which.
    """
    tensors = checkpoint.tensors
    own: list[Target] = []
    dropped: list[tuple[str, str]] = []
    is_own = {part: False for _, _, part in found.copies}
    width = int(found.config.get("hidden_size") or 0)
    for name, stored, part in found.copies:
        trunk = _trunk(tensors, part, found)
        family_has_own = (
            found.convention.embedding if part == "embed_tokens" else found.convention.lm_head
        ) == "own"
        if stored in tensors and trunk is not None and same_bytes(tensors[stored], tensors[trunk]):
            dropped.append((stored, trunk))
        elif stored in tensors or family_has_own:
            rows = tensors[trunk].shape[0] if trunk else int(found.config.get("vocab_size") or 0)
            own.append(Target(name, (rows, width), ((stored, (rows, width)),)))
            is_own[part] = True
    for name, stored, part in found.copies:  # one convention for all heads: if one has its own, all get one
        if is_own[part] and not any(target.name == name for target in own):
            trunk = _trunk(tensors, part, found)
            shape = (tensors[trunk].shape[0] if trunk else 0, width)
            own.append(Target(name, shape, ((stored if stored in tensors else trunk or stored, shape),)))
            dropped = [pair for pair in dropped if pair[0] != stored]
    says = {part: "own" if value else "shared" for part, value in is_own.items()}
    convention = replace(
        found.convention,
        embedding=says.get("embed_tokens", found.convention.embedding),
        lm_head=says.get("lm_head", found.convention.lm_head),
    )
    return own, dropped, convention


def _trunk(tensors: Mapping[str, LazyTensor], part: str, found: Found) -> str | None:
    """Name of the trunk's tensor that `part` may be a copy of, or None; a tied LM head is the embedding."""
    names = _TRUNK[part]
    if part == "lm_head" and found.config.get("tie_word_embeddings"):
        names += _TRUNK["embed_tokens"]
    return next((name for name in names if name in tensors and name not in found.owned), None)


def same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    x, y = (np.ascontiguousarray(t.load()).reshape(-1).view(np.uint8) for t in (a, b))
    return all(np.array_equal(x[i : i + _CHUNK], y[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK))


# --- checks -------------------------------------------------------------------------------------------------


def _check(checkpoint: Checkpoint, found: Found, targets: list[Target]) -> None:
    """Raises one ConversionError that lists every missing, unexpected, misshapen or wrongly typed tensor."""
    tensors = checkpoint.tensors
    used: set[str] = set().union(*(parts_of(stored, tensors) for _, stored, _ in found.copies))
    problems: dict[str, str] = {}
    for target in targets:
        for name, shape in target.sources:
            used.add(name)
            if name not in tensors:
                problems[name] = f"missing {name} {list(shape)}"
            elif tensors[name].shape != shape:
                problems[name] = f"{name} is {list(tensors[name].shape)}, {list(shape)} expected"
            elif tensors[name].dtype not in target.dtypes:
                wanted = "a float type" if target.dtypes == FLOATS else target.dtypes[0]
                problems[name] = f"{name} is of type {tensors[name].dtype}, {wanted} expected"
            elif not target.made_as and tensors[name].dtype != tensors[target.sources[0][0]].dtype:
                problems[name] = f"{name} is of type {tensors[name].dtype}, its siblings are not"
    for name in sorted(found.owned - used):
        if not name.endswith("rotary_emb.inv_freq"):
            problems[name] = f"unexpected {name} {list(tensors[name].shape)}"
    if problems:
        shown = "; ".join(list(problems.values())[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ConversionError(
            f"{checkpoint.path}: tensors of the heads do not fit {found.title} as its configuration describes it "
            f"({len(problems)}): {shown}{more}"
        )
