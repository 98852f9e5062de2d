"""Proves that acceptance finds out which convention heads were trained for, whichever wrong one was written.

The base is a table: token v is followed by (v + 7) % 40, whatever came before. Its embedding is one-hot and its last
norm turns the sign of two thirds of the states. The head reads the state only.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mtp_mlx.convert.heads.variant import Variant
from mtp_mlx.convert.heads.verify import verify_folder, verify_heads
from mtp_mlx.drafters.heads.cascade import MTPHeads, new_heads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.folder import LAST_LAYER, HeadsConfig, heads_header
from mtp_mlx.drafters.heads.folder import save as save_heads
from mtp_mlx.drafters.heads.mtp_head import MTPHead
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.tiny import tiny_model

V, D, STEP = 40, 48, 7
HIDDEN, ORDER, NORMS = ("post-norm", "pre-norm"), ("embedding", "hidden"), (False, True)
GAIN = np.where(np.arange(D) % 3, -1.0, 1.0).astype(np.float32)  # [D] of the base's last norm
EVERY = [Variant(*values) for values in itertools.product(HIDDEN, ORDER, NORMS)]


class Numbers:
    """A tokenizer whose texts have no end."""

    eos_token_ids: frozenset[int] = frozenset()


def ids(text: str) -> list[int]:
    """Of the first letters of a text."""
    return [ord(letter) % V for letter in text[:6]]


def table() -> Any:
    """The base: every layer adds nothing."""
    model = tiny_model("llama", vocab_size=V, seed=3)
    silence(model.model.layers)
    one_hot = mx.concatenate([mx.eye(V), mx.zeros((V, D - V))], axis=1)  # [V, D]
    model.model.embed_tokens.weight = one_hot
    model.model.norm.weight = mx.array(GAIN)
    model.lm_head.weight = (
        mx.array(GAIN) * one_hot[(mx.arange(V) - STEP) % V]
    )  # row v answers the token v - 7
    return model


def silence(layers: Any) -> None:
    """Layers that add nothing to their input."""
    for layer in layers:
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)


def trained_for(model: Any, truth: Variant, written: Variant, steps: int = 1) -> MTPHeads:
    """A head that fits `truth`, converted by a program that believed in `written`.

    steps: how much further than its state it looks; a first head looks one step further.
    """
    heads = new_heads(model, 1, HeadConvention("test", **vars(written)))
    head = heads.heads[0]
    silence([head.block])
    # 1 added to the one, or taken off the other, turns a sign; the other is turned by the weight below.
    head.norm_hidden.weight, head.norm_out.weight = mx.full((D,), -0.5), mx.full((D,), 0.5)
    # State of v -> that of v + 7, whose answer is v + 14; or further.
    now, then = np.arange(V), (np.arange(V) + steps * STEP) % V
    shift = np.zeros((D, D), np.float32)
    shift[then, now] = -GAIN[then] * (1 if truth.first_hidden == "pre-norm" else GAIN[now])
    fuse = np.hstack([np.zeros((D, D), np.float32), shift])
    if truth.stored_order != written.stored_order:
        fuse = np.hstack([fuse[:, D:], fuse[:, :D]])
    head.fuse.weight = mx.array(fuse)
    wrong = int(written.zero_centred_norms) - int(truth.zero_centred_norms)
    norms = [(name, value + wrong) for name, value in tree_flatten(head.parameters()) if "norm" in name]
    head.update(tree_unflatten(norms))
    return heads


def wrong_in(one: Variant, other: Variant) -> int:
    """In how many of the three they differ."""
    return sum(a != b for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


@pytest.mark.parametrize("truth", EVERY, ids=str)
def test_the_right_convention_is_found(truth: Variant) -> None:
    """Whichever of the eight the weights are for, and whatever was written: the same, one wrong, or all."""
    model = table()
    for written in (other for other in EVERY if wrong_in(other, truth) != 2):
        heads = trained_for(model, truth, written)
        before = dict(tree_flatten(heads.parameters()))
        result = verify_heads(model, Numbers(), heads, [ids("some text")], 16)
        assert result.tokens == 15  # the first token is no draft
        if written == truth:
            assert result.acceptance == [1.0] and result.others == {} and result.fits_better is None
        else:
            assert result.acceptance[0] < 0.5 and len(result.others) == 11
            assert result.others[truth] == 1.0 and result.fits_better == truth
            assert f"trained for {truth}, not for {written}" in result.lines()[-1]
        after = dict(tree_flatten(heads.parameters()))
        assert all(mx.array_equal(after[name], value) for name, value in before.items())
    assert isinstance(model.model.norm, nn.RMSNorm)


def test_what_to_do_is_said() -> None:
    truth, written = Variant("pre-norm", "hidden", True), Variant("post-norm", "embedding", False)
    model = table()
    lines = verify_heads(model, Numbers(), trained_for(model, truth, written), [ids("abc")], 9).lines()
    assert lines[-1].endswith("with `head_norms` zero-centred `head_order` hidden `head_hidden` pre-norm")
    assert lines[1] == f"verify: acceptance of head 1 would be 1.00 with {truth}"


def test_a_weight_whose_halves_share_a_group_is_tried_in_its_own_order() -> None:
    """Half a row is 48 numbers and a group 32, so the packed columns cannot change places."""
    model = table()
    written = Variant("post-norm", "embedding", False)
    heads = trained_for(model, Variant("post-norm", "embedding", True), written)
    nn.quantize(heads, 32, 8, class_predicate=lambda path, _: path.endswith("fuse"))
    result = verify_heads(model, Numbers(), heads, [ids("some text")], 9)
    assert {variant.stored_order for variant in result.others} == {"embedding"}
    assert result.fits_better is not None and result.fits_better.zero_centred_norms


def test_heads_that_fit_nothing() -> None:
    model = table()
    heads = new_heads(model, 1, HeadConvention("test"))
    heads.heads[0].fuse.weight = mx.zeros((D, 2 * D))
    result = verify_heads(model, Numbers(), heads, [ids("some text")], 20)
    assert result.fits_better is None and "no convention fits clearly better" in result.lines()[-1]


def test_deeper_depths_are_given_those_before() -> None:
    """Head 2 is right on even tokens only: half of the rows where head 1 was right, which is everywhere."""
    model = table()
    truth = Variant("post-norm", "embedding", False)
    first, second = (trained_for(model, truth, truth).heads[0] for _ in range(2))
    fuse = np.array(second.fuse.weight)
    fuse[:, D + np.arange(1, V, 2)] *= -1
    second.fuse.weight = mx.array(fuse)
    heads = MTPHeads([first, second], HeadConvention("test"))
    result = verify_heads(model, Numbers(), heads, [ids("some text")], 40)
    assert result.acceptance[0] == 1.0 and result.acceptance[1] == pytest.approx(0.5, abs=0.05)
    swapped = verify_heads(
        model, Numbers(), MTPHeads([second, first], HeadConvention("test")), [ids("some text")], 40
    )
    # What follows a wrong draft is wrong too, and no draft of depth 2: among the others every one is right.
    assert swapped.acceptance[0] == pytest.approx(0.5, abs=0.05) and swapped.acceptance[1] == 1.0


@pytest.mark.parametrize("truth", ["normed", "raw", "trunk"])
@pytest.mark.parametrize("written", ["normed", "raw", "trunk"])
def test_the_state_of_the_second_draft_is_found(truth: str, written: str) -> None:
    """The head's last norm turns the sign of every other number, so that one state is not the other."""
    model = table()
    plain, sign = (
        Variant("post-norm", "embedding", False),
        np.where(np.arange(D) % 2, -1.0, 1.0).astype(np.float32),
    )
    first = trained_for(model, plain, plain).heads[0]
    second = trained_for(model, plain, plain, 2 if truth == "trunk" else 1).heads[0]
    for head in (first, second):
        head.norm_out.weight = mx.array(0.5 * sign)
        head.fuse.weight = head.fuse.weight * mx.array(sign)[:, None]
    if truth == "raw":
        second.fuse.weight = second.fuse.weight * mx.array(np.concatenate([np.ones(D, np.float32), sign]))
    heads = MTPHeads([first, second], HeadConvention("test", recycled_hidden=written))
    for head in heads.heads:
        head._recycled = written
    result = verify_heads(model, Numbers(), heads, [ids("some text")], 40)
    assert result.acceptance[0] == 1.0 and result.second[truth] == 1.0 and min(result.second.values()) < 0.6
    assert result.recycles_better == (None if truth == written else truth)
    mend = f"verify: convert again with `head_recycled` {truth}"
    assert (result.lines()[-1] == mend) == (truth != written)
    assert [head._recycled for head in heads.heads] == [written] * 2
    assert result.to_json()["second draft by its state"] == result.second


def test_heads_with_their_own_embedding_and_lm_head() -> None:
    """Step-3.5's and LongCat's: the trunk's would be wrong, since theirs are in another order."""
    model, plain = table(), Variant("post-norm", "embedding", False)
    shared = trained_for(model, plain, plain).heads[0]
    convention = HeadConvention("test", embedding="own", lm_head="own")
    head = MTPHead(shared.block, D, 1e-5, convention, V)
    weights = [(name, value) for name, value in tree_flatten(shared.parameters())]
    order = mx.array(np.random.default_rng(0).permutation(D))
    # The head's states are in another order, which only its own LM head undoes.
    head.update(tree_unflatten(weights))
    head.fuse.weight = head.fuse.weight[order]
    head.lm_head.weight = model.lm_head.weight[:, order]
    found = verify_heads(model, Numbers(), MTPHeads([head], convention), [ids("some text")], 16)
    assert found.acceptance == [1.0]
    head.lm_head.weight = model.lm_head.weight
    wrong = verify_heads(model, Numbers(), MTPHeads([head], convention), [ids("some text")], 16)
    assert wrong.acceptance[0] < 0.5


def test_a_trained_head(own_text: Callable[..., Any]) -> None:
    """No construction: a head trained for a hundred steps on what a random base writes, read after its last norm."""
    model, heads, prompts = own_text
    result = verify_heads(model, Numbers(), heads, prompts, 30)
    assert result.acceptance[0] > 0.9 and result.others == {}
    wrong = MTPHeads(heads.heads, HeadConvention("test", first_hidden="pre-norm"))
    result = verify_heads(model, Numbers(), wrong, prompts, 30)
    assert result.acceptance[0] < 0.5 and result.fits_better == Variant("post-norm", "embedding", False)


@pytest.fixture(scope="module")
def own_text() -> Any:
    """(base, head trained on the base's own text, prompts)."""
    model = tiny_model("llama", vocab_size=V, seed=3)
    # Far from all ones, as the last norms of released models are.
    model.model.norm.weight = mx.array(np.random.default_rng(0).normal(size=D).astype(np.float32)) * 2
    prompts = [ids(text) for text in ("some text", "other words", "and so on")]
    heads = new_heads(model, 1, HeadConvention("test"))
    texts = [greedy(model, prompt, 30) for prompt in prompts]
    text = mx.array(texts)
    hidden, embeddings = model.model(text), model.model.embed_tokens(text)

    def loss(module: MTPHeads) -> mx.array:
        z = module.cascade(embeddings, hidden)[0][:, :-1]
        return nn.losses.cross_entropy(model.lm_head(z), text[:, 2:], reduction="mean")

    optimizer, step = optim.Adam(3e-3), nn.value_and_grad(heads, loss)
    for _ in range(100):
        _, gradients = step(heads)
        optimizer.update(heads, gradients)
        mx.eval(heads.parameters(), optimizer.state)
    return model, heads, prompts


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The text, every token by a forward pass over all before it."""
    for _ in range(count):
        ids = [*ids, int(mx.argmax(model(mx.array([ids]))[0, -1]))]
    return ids


def test_the_folder_keeps_what_was_measured(tmp_path: Path) -> None:
    model = table()
    truth = Variant("post-norm", "embedding", False)
    heads = trained_for(model, truth, truth)
    config = HeadsConfig(heads.convention, [dict(LAST_LAYER)])
    info = heads_header(config, "table", base_fingerprint(model), measurements={"x": 1})
    save_heads(tmp_path / "heads", heads, info)
    verify_folder(model, Numbers(), tmp_path / "heads", [ids("some text")], 9)
    config = json.loads((tmp_path / "heads" / "mtp_config.json").read_text())
    assert config["acceptance"] == [1.0] and config["measurements"]["x"] == 1
    assert config["measurements"]["verify"]["tokens"] == 8
