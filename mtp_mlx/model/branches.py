"""Whether a model's passes can hold drafts with branches, where rows are not in the order of their positions.

Attention sees what the block's visibility says, and rotary embeddings get explicit positions. Models that number the
rows of a pass in some other way, such as by a learned embedding of positions or a scale that grows with them, would
give wrong logits without an error. They are found by their source and by trying one small tree.
"""

from __future__ import annotations

import inspect
import re
import sys

import mlx.core as mx
import numpy as np

from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block, block_shape

PREFIX, TREE, CHAIN = (1, 2, 3), (4, 5, 6, 7), (4, 6, 7)  # token ids; 7 follows 6, which is a sibling of 5
PARENTS = (-1, -1, 1)
TOLERANCE, HALF_TOLERANCE = (
    1e-3,
    0.05,
)  # relative: far above rounding, far below the effect of a wrong position
NUMBERS_ROWS = re.compile(r"arange\(.*\boffset\b|arange\(.*\)\s*\+\s*offset\b")


def why_no_branches(model: AttachedModel) -> str:
    """The reason why its drafts may have no branches, for people; "" if they may. Found once and kept."""
    if model.branches is None:
        model.branches = _reason(model)
    return model.branches


def why_never(model: AttachedModel) -> str:
    """As `why_no_branches` as far as it shows without a pass, and without saying what it is the reason of."""
    if model.why_chains:
        return model.why_chains
    return "this model numbers the rows of a pass by itself" if _numbers_rows(model) else ""


def _reason(model: AttachedModel) -> str:
    if reason := why_never(model):
        return f"drafts without branches: {reason}"
    model.place_rows()
    if _error(model) > (TOLERANCE if model.embed(mx.array([0])).dtype == mx.float32 else HALF_TOLERANCE):
        return "drafts without branches: a small tree gives this model other results than its chains"
    return ""


def _numbers_rows(model: AttachedModel) -> bool:
    """Whether the source of one of the model's parts numbers rows from the cache's offset on."""
    names = {type(part).__module__ for part in model.model.modules()}
    for module in (sys.modules[name] for name in names if name.startswith("mlx_lm.models.")):
        try:
            found = NUMBERS_ROWS.search(inspect.getsource(module))
        except (OSError, TypeError):  # no source on this machine: the small tree has to tell
            continue
        if found:
            return True
    return False


def _error(model: AttachedModel) -> float:
    """Relative error of the last state of a path in a tree, against the same path alone."""
    found = []
    for tokens, parents in ((TREE, PARENTS), (CHAIN, ())):
        cache = model.make_cache()
        model.forward(Block.real(_ids(model, PREFIX)[None]), cache)
        drafts = len(tokens) - 1
        shape = block_shape(drafts, (0,) * (drafts + 1), 0, parents)
        block = Block.decode(_ids(model, tokens), shape, len(PREFIX), model.vocab_size)
        found.append(np.array(model.forward(block, cache)[0, -1].astype(mx.float32)))
    return float(np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1]))


def _ids(model: AttachedModel, tokens: tuple[int, ...]) -> mx.array:
    return mx.array([token % model.vocab_size for token in tokens], dtype=mx.int32)
