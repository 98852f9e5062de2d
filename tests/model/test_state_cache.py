"""Recurrent state kept for n rows of a step is the state after n rows alone, for every architecture that has some."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList

from mtp_mlx.decode.rollback import LayerCaches
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.block import Block, block_shape
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.model.state_cache import RecordedMixer, TapedLinear, find_mixers
from tests.decode.fakes import random_adapter
from tests.tiny import RECURRENT, VOCABULARY, tiny_model

PREFIX, STEP = [3, 5, 7, 11, 90], [20, 31, 42, 53, 64, 75]
SUPPORTED = [name for name in RECURRENT if name != "recurrent_gemma"]
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def run(attached: AttachedModel, caches: LayerCaches, tokens: list[int], is_step: bool = True) -> mx.array:
    """Hidden states [R, D] of a pass."""
    caches.mark(len(tokens))
    block = Block.real(mx.array([tokens]))
    if is_step:
        shape = block_shape(len(tokens) - 1, (0,) * len(tokens))
        block = Block.decode(mx.array(tokens), shape, caches.marked, attached.vocab_size)
    hidden = attached.forward(block, caches.layers)[0]
    caches.check_pass(len(tokens))
    return hidden


def started(attached: AttachedModel) -> LayerCaches:
    """Caches that hold PREFIX."""
    caches = LayerCaches(attached.make_cache(), "m")
    run(attached, caches, PREFIX, is_step=False)
    return caches


def states(caches: LayerCaches) -> list[np.ndarray]:
    """Every array of recurrent state."""
    leaves = [
        leaf
        for layer in caches.layers
        for leaf in (layer.caches if isinstance(layer, CacheList) else [layer])
    ]
    return [np.array(array) for leaf in leaves if isinstance(leaf, ArraysCache) for array in leaf.cache]


def same(caches: LayerCaches, expected: LayerCaches, exact: bool = False) -> None:
    assert caches.length == expected.length
    for own, other in zip(states(caches), states(expected), strict=True):
        assert own.shape == other.shape
        if exact:
            np.testing.assert_array_equal(own, other)
        else:
            np.testing.assert_allclose(own, other, **TOLERANCE)


@pytest.mark.parametrize("name", SUPPORTED)
def test_kept_rows_alone_are_in_the_state(name: str) -> None:
    """Against passes over one row each; then another step from there, and back to where it began."""
    attached = attach(tiny_model(name, seed=3))
    for kept in range(len(STEP) + 1):
        caches, expected = started(attached), started(attached)
        for token in STEP[:kept]:
            run(attached, expected, [token])
        run(attached, caches, STEP)
        if kept < 4:
            caches.keep(kept + 2)  # keeping less of the same pass later is keeping less
        caches.keep(kept)
        same(caches, expected)
        found, alone = run(attached, caches, STEP[::-1]), run(attached, expected, STEP[::-1])
        np.testing.assert_allclose(np.array(found), np.array(alone), rtol=2e-3, atol=2e-3)
        caches.keep(0)
        expected.keep(0)
        same(caches, expected)


@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h", "falcon_h1", "lfm2", "rwkv7"])
def test_exact_states_are_those_of_rows_alone_bit_for_bit(name: str) -> None:
    attached = attach(tiny_model(name, seed=3), exact=True)
    for kept in range(1, len(STEP) + 1):
        caches, expected = started(attached), started(attached)
        alone = [run(attached, expected, [token])[0] for token in STEP[:kept]]
        hidden = run(attached, caches, STEP)
        caches.keep(kept)
        np.testing.assert_array_equal(np.array(hidden[:kept]), np.array(mx.stack(alone)))
        same(caches, expected, exact=True)


@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h", "granitemoehybrid"])
def test_no_linear_layer_of_a_mixer_runs_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back reads no weight of a projection: their recorded rows are used."""
    attached = attach(tiny_model(name, seed=3))
    caches = started(attached)
    mx.eval(run(attached, caches, STEP))
    calls: list[int] = []
    linear = nn.Linear.__call__
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: calls.append(1) or linear(self, x))
    caches.keep(3)
    assert not calls
    run(attached, caches, STEP)
    assert calls


@pytest.mark.parametrize("wrong", ["before", "rows"])
def test_a_fault_in_going_back_shows(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is not empty: the state before the step, or one row too many, is seen."""
    attached = attach(tiny_model("qwen3_next", seed=3))
    caches, expected = started(attached), started(attached)
    for token in STEP[:2]:
        run(attached, expected, [token])
    run(attached, caches, STEP)
    caches.keep(2 if wrong == "before" else 3)
    if wrong == "before":
        for state, before in zip(caches._states, caches._mark[1], strict=True):
            state.cache[:] = before
    else:
        caches._rows = 2
    with pytest.raises(AssertionError):
        same(caches, expected)


def test_a_chunk_of_a_prompt_can_only_leave_whole() -> None:
    attached = attach(tiny_model("qwen3_next", seed=3))
    caches = started(attached)
    with pytest.raises(ValueError, match="2 of 5 rows cannot be kept"):
        caches.keep(2)
    with pytest.raises(ValueError, match="cannot be rolled back by 1 rows before"):
        caches.keep(-1)
    caches.keep(0)
    assert caches.length == 0 and all(state.empty() for state in caches._states)


@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h", "rwkv7"])
def test_detaching_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny_model(name, seed=3)
    classes = {path: type(module) for path, module in model.named_modules()}
    weights = [path for path, _ in tree_flatten(model.parameters())]
    fingerprint, tokens = base_fingerprint(model), mx.array([PREFIX])
    expected = model(tokens)
    attached = attach(model)
    assert any(isinstance(module, RecordedMixer) for _, module in model.named_modules())
    assert any(isinstance(module, TapedLinear) for _, module in model.named_modules())
    assert base_fingerprint(model) == fingerprint
    assert mx.array_equal(model(tokens), expected)
    with pytest.raises(MTPError, match="already attached"):
        attach(model)
    attached.detach()
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert [path for path, _ in tree_flatten(model.parameters())] == weights
    assert mx.array_equal(model(tokens), expected)


def test_mixers_are_the_innermost_modules_with_a_cache() -> None:
    model = tiny_model("falcon_h1", seed=3)
    assert set(find_mixers(model.model.layers[0])) == {"mamba", "self_attn"}


# --- slots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h", "lfm2"])
def test_slots_go_on_from_the_state_behind_the_real_rows(name: str, exact: bool) -> None:
    """Gated in recurrent layers too, and in both ways to compute real rows; the state is that of the real rows."""
    model = tiny_model(name, seed=3)
    attached = attach(model, random_adapter(model), exact=exact)
    tokens, slots = mx.array([4, 9, 2]), mx.array([[VOCABULARY, VOCABULARY + 1]])
    together, apart = (LayerCaches(attached.make_cache(), name) for _ in range(2))
    for caches in (together, apart):
        caches.mark(4)
        attached.forward(Block.real(mx.array([[3, 5, 7, 11]])), caches.layers)
    block = Block.decode(tokens, block_shape(2, (0, 0, 2)), 4, VOCABULARY)
    together.mark(5)
    hidden = attached.forward(block, together.layers)[:, 3:]
    together.check_pass(5)
    together.keep(3)
    apart.mark(3)
    attached.forward(Block.real(tokens[None]), apart.layers)
    for mine, theirs in zip(together._states, apart._states, strict=True):
        for one, other in zip(mine.cache, theirs.cache, strict=True):
            np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-5)
    apart.mark(2)
    alone = attached.forward(Block(slots, n_real=0), apart.layers)
    np.testing.assert_allclose(np.array(hidden), np.array(alone), rtol=1e-3, atol=1e-4)


# --- refusals -----------------------------------------------------------------------------------------------


def test_state_that_no_recorded_module_moves_is_refused() -> None:
    """recurrent_gemma hands out the arrays of its cache, not the cache: nothing could be taken back."""
    attached = attach(tiny_model("recurrent_gemma", seed=3))
    with pytest.raises(MTPError, match="'m' has no seam 'cache' in recurrent layer 0"):
        started(attached)


def test_state_that_does_not_say_where_it_is_is_refused() -> None:
    attached = attach(tiny_model("rwkv7", seed=3))
    caches = started(attached)
    caches.hand_back()
    with pytest.raises(MTPError, match="does not say how many tokens it has read"):
        LayerCaches(caches.layers, "m")
