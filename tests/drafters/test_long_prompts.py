"""Proves that no drafter reads a long prompt in one evaluation, for whose end Ctrl-C would have to wait."""

from __future__ import annotations

import io
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.decode.drafter import source_of
from mtp_mlx.decode.pick import Picker
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.drafters.draft_model.source import DraftModel
from mtp_mlx.model.attach import AttachedModel, attach
from tests.decode.fakes import attached
from tests.drafters.heads.test_chain import model_with_heads
from tests.drafters.heads.test_independent import model_with
from tests.tiny import VOCABULARY, tiny_model

DRAFTERS = {
    "slots": lambda: attached("llama"),
    "heads": lambda: model_with_heads("llama", 4, 4),
    "parallel heads": lambda: model_with("parallel"),
    "medusa": lambda: model_with("medusa"),
    "draft model": lambda: attach(
        tiny_model("llama", seed=3),
        DraftModel(tiny_model("llama", seed=4, num_hidden_layers=5), VOCABULARY, 4),
    ),
}
LENGTH = 300  # more than the rows that heads let wait


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_evaluation_is_short(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the last layer of the model and one layer of a drafter."""
    model: AttachedModel = DRAFTERS[name]()
    evaluate, layers = mx.eval, []

    def counted(*arrays: Any) -> None:
        graph = io.StringIO()
        found = [value for _, value in tree_flatten(list(arrays)) if isinstance(value, mx.array)]
        mx.export_to_dot(graph, *found)  # what has been evaluated is no longer in it
        names = graph.getvalue()
        layers.append(names.count('"Softmax"') + names.count('"ScaledDotProductAttention"'))
        evaluate(*arrays)

    source = source_of(model)
    assert source is not None
    prompt = [token % 100 for token in range(LENGTH)]
    picker = Picker()
    session = Session(
        model,
        picker,
        prompt,
        model.make_cache(),
        CacheSettings(),
        lambda start: source.open(model, picker, source.drafts, start),
    )
    monkeypatch.setattr(mx, "eval", counted)
    session.prefill()
    assert sum(layers) >= 1 and max(layers) <= 2, layers
