"""Proves that heads can take another of the trunk's states than the last: what a step drafts is the oracle's.

DeepSeek-V3 and GLM-4.5 are the families on whose first state published runtimes disagree.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.block import Block
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.model.tap import Tap, tapped_module
from tests.convert.heads.parity_setup import TOKENS, Parity, drafts_of_two_steps, same_text

CASES = [
    ("deepseek-v3", "pre-norm"),
    ("glm-4.5", "pre-norm"),
    ("mimo-7b", "before-last-layer"),
]


def with_first_hidden(name: str, first: str, folder: Path) -> Parity:
    """A family whose converted folder says that another state goes in first."""
    parity = Parity.of(name, folder, first_hidden=first)
    parity.family = replace(parity.family, rules=replace(parity.family.rules, first=first))
    return parity


@pytest.mark.parametrize(("name", "first"), CASES)
def test_drafts_and_text(tmp_path: Path, name: str, first: str) -> None:
    parity = with_first_hidden(name, first, tmp_path)
    found, expected = drafts_of_two_steps(parity)
    assert found == expected
    wrong = replace(parity.family, rules=replace(parity.family.rules, first="post-norm"))
    assert drafts_of_two_steps(replace(parity, family=wrong))[1] != found
    same_text(parity)


def test_the_trunk_is_as_it_was(tmp_path: Path) -> None:
    """Logits, names of parameters and fingerprint are the bare model's, and after detaching its classes too."""
    parity = with_first_hidden("mimo-7b", "pre-norm", tmp_path)
    ids = mx.array([TOKENS])
    fingerprint, kind = base_fingerprint(parity.model), type(parity.trunk.norm)
    before = parity.model(ids)
    attached = attach(parity.model, parity.heads)
    hidden = attached.forward(Block.real(ids), attached.make_cache())
    assert mx.array_equal(attached.head(hidden), before).item()
    assert mx.array_equal(parity.trunk.norm(attached.head_input), hidden).item()
    assert base_fingerprint(parity.model) == fingerprint
    with attached.unwrapped():
        assert type(parity.trunk.norm) is kind
    with pytest.raises(MTPError, match="already attached"):
        attach(parity.model, parity.heads)
    attached.detach()
    assert type(parity.trunk.norm) is kind and mx.array_equal(parity.model(ids), before).item()


def test_a_trunk_without_such_a_norm_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(2, 2)]

    assert tapped_module(Bare(), "post-norm") is None
    with pytest.raises(MTPError, match="hidden states 'pre-norm', but the trunk's final norm is not found"):
        tapped_module(Bare(), "pre-norm")
    with pytest.raises(MTPError, match="before-last-layer"):
        tapped_module(Bare(), "before-last-layer")
    norm = nn.RMSNorm(2)
    tap = Tap(norm)
    norm(mx.ones((1, 2)))
    assert mx.array_equal(tap.take(), mx.ones((1, 2))).item()
    tap.remove()
    assert type(norm) is nn.RMSNorm and "_tap" not in vars(norm)
