"""Loading the model that `load(..., draft_model=...)` names, and checking that it drafts for the right vocabulary."""

from __future__ import annotations

from typing import Any

from mtp_mlx.decode.drafter import DraftSource
from mtp_mlx.drafters.draft_model.options import DraftModelLoading
from mtp_mlx.drafters.draft_model.source import DraftModel
from mtp_mlx.drafters.registry import LoadContext
from mtp_mlx.errors import MTPError
from mtp_mlx.model.seams import embedding_shape, find_seams
from mtp_mlx.models import load_base


def prepare(source: DraftSource | None, options: DraftModelLoading, context: LoadContext) -> DraftSource:
    """The draft model that the options name.

    Raises:
        MTPError: a number of drafts without a model, an adapter that is to draft too, a model that cannot be loaded,
            or one of another vocabulary.
    """
    if options.draft_model is None:
        raise MTPError("`num_draft_tokens` says how much a draft model drafts: name it with `draft_model`")
    if source is not None and context.adapter_named:
        raise MTPError("one drafter at a time: leave `adapter` or `draft_model` out")
    model, tokenizer = load_base(options.draft_model)
    check_vocabulary(options.draft_model, tokenizer, context.tokenizer)
    rows, _ = embedding_shape(find_seams(context.model).embedding)
    return DraftModel(model, rows, options.num_draft_tokens)


def check_vocabulary(name: str, drafting: Any, target: Any) -> None:
    """Refuses a draft model whose ids mean other tokens than the target's.

    Args:
        name: of the draft model.
        drafting, target: tokenizers.

    Raises:
        MTPError: the vocabularies differ; how many ids do is said.
    """
    theirs, ours = drafting.get_vocab(), target.get_vocab()
    if theirs != ours:
        different = len(set(theirs.items()) ^ set(ours.items()))
        raise MTPError(
            f"the draft model {name} has another vocabulary ({len(theirs)} tokens, the model has {len(ours)}; "
            f"{different} entries differ): choose a draft model of the same family"
        )
