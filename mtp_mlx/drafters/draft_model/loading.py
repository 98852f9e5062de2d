"""Loads the model that `load(..., draft_model=...)` names, and checks that its vocabulary is the target's."""

from __future__ import annotations

from typing import Any

from mtp_mlx.base_model import load_base
from mtp_mlx.decode.drafter import DraftSource
from mtp_mlx.drafters.draft_model.options import DraftModelLoading
from mtp_mlx.drafters.draft_model.source import DraftModel
from mtp_mlx.drafters.registry import LoadContext
from mtp_mlx.errors import MTPError
from mtp_mlx.model.seams import embedding_shape, find_seams


def prepare(source: DraftSource | None, options: DraftModelLoading, context: LoadContext) -> DraftSource:
    """The draft model that the options name.

    Raises:
        MTPError: if `num_draft_tokens` is given without a draft model, if the user named an adapter too, if the draft
            model cannot be loaded, or if its vocabulary differs.
    """
    if options.draft_model is None:
        raise MTPError("`num_draft_tokens` is for a draft model: name one with `draft_model`")
    if source is not None and context.adapter_named:
        raise MTPError("one drafter at a time: leave `adapter` or `draft_model` out")
    model, tokenizer = load_base(options.draft_model, trust_remote_code=context.trust_remote_code)
    check_vocabulary(options.draft_model, tokenizer, context.tokenizer)
    rows, _ = embedding_shape(find_seams(context.model).embedding)
    return DraftModel(model, rows, options.num_draft_tokens)


def check_vocabulary(name: str, drafting: Any, target: Any) -> None:
    """Checks that the draft model's ids stand for the same tokens as the target's.

    Args:
        name: name of the draft model, for the message.
        drafting, target: the tokenizers of the two models.

    Raises:
        MTPError: if the vocabularies differ (says in how many entries).
    """
    theirs, ours = drafting.get_vocab(), target.get_vocab()
    if theirs != ours:
        different = len(set(theirs.items()) ^ set(ours.items()))
        raise MTPError(
            f"the draft model {name} has another vocabulary ({len(theirs)} tokens, the model has {len(ours)}; "
            f"{different} entries differ): choose a draft model of the same family"
        )
