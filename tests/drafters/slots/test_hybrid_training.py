"""Slots of models with recurrent layers, trained: gradients are those of one forward pass per anchor."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.masks.losses import Apple
from mtp_mlx.drafters.masks.step import StepRunner, row_weights, slot_batch, teacher_targets
from mtp_mlx.drafters.ptp.inverse_ar import InverseAR
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.drafters.slots.layout import Part, SlotLayout, build_layout
from mtp_mlx.drafters.slots.step import BlockChoice
from mtp_mlx.drafters.slots.two_pass import every_slot_pass, prefix_pass, token_pass
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.block import Block
from mtp_mlx.model.seams import find_seams
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_columns
from mtp_mlx.train.plan import StepPlan
from tests.drafters.ptp.ptp_fakes import random_ptp_adapter
from tests.model.naive import random_adapter
from tests.tiny import RECURRENT, tiny_model
from tests.train.training import Remembering, examples, make_trainer, settings_for

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5": {},
    "qwen3_next": {},
    "granitemoehybrid": {"position_embedding_type": "nope"},
    "lfm2": {},
    "nemotron_h": {},
    "falcon_h1": {},  # attention and recurrence in one layer
    "rwkv7": {},
    "mamba2": {},
    "bailing_moe_linear": {},  # rotary embeddings in recurrent layers
}
QWEN3_5 = RECURRENT["qwen3_5"]["text_config"]
OBJECTIVE = Apple(lcm_weight=0.5, chunk_rows=16)


def one_pass_per_anchor(attached: AttachedModel, layout: SlotLayout) -> mx.array:
    """Hidden states of the supervised slot rows, [M, D]: each block as the end of a text of its own."""
    blocks: dict[tuple[int, int], mx.array] = {}
    rows = []
    for row in layout.rows.tolist():
        sequence, place = divmod(row, layout.block.shape[1])
        block, slot = int(layout.block[sequence, place]), int(layout.slot[sequence, place])
        if (sequence, block) not in blocks:
            anchor, length = int(layout.anchors[sequence, block]), int(layout.lengths[sequence, block])
            text = mx.array(layout.tokens[sequence, : anchor + 1])
            ids = mx.concatenate([text, attached.vocab_size + mx.arange(length)])[None]
            hidden = attached.forward(Block(ids, n_real=anchor + 1), attached.make_cache())
            blocks[sequence, block] = hidden[0, anchor + 1 :]
        rows.append(blocks[sequence, block][slot])
    return mx.stack(rows)


def relative(found: dict[str, mx.array], expected: dict[str, mx.array]) -> float:
    """Largest difference of a tensor's gradient, over its largest entry."""
    assert found.keys() == expected.keys()
    return max(
        mx.abs(found[name] - value).max().item() / mx.abs(value).max().item()
        for name, value in expected.items()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_one_pass_per_anchor(name: str) -> None:
    """Whole, in slices, and with layers computed again; with blocks of one to three slots."""
    model = tiny_model(name, seed=3, **FAMILIES[name])
    model.freeze()
    attached = attach(model, random_adapter(model))
    adapter, rows = attached.speculator, examples(2)
    assert isinstance(adapter, nn.Module)
    choice = BlockChoice(slots=3, share=0.6, chunk_blocks=4, depth_decay=0.8, lengths="random")
    layout = choice.layout(rows, 0, 5)
    columns, prefix = draft_columns(attached), prefix_pass(attached, layout)
    weights, whole = row_weights(layout, 0.8), Part(0, slice(0, None), slice(0, len(layout.rows)))
    targets = teacher_targets(attached, layout, prefix, columns, whole)

    def loss() -> mx.array:
        hidden = one_pass_per_anchor(attached, layout)
        batch = slot_batch(hidden, layout, whole, targets, weights, columns)
        return OBJECTIVE(attached, batch).total

    total, gradients = nn.value_and_grad(adapter, loss)()
    expected = dict(tree_flatten(gradients))
    recurrent = [path for path in attached._seams.mixers if "self_attn" not in path]
    assert all(mx.abs(value).max().item() > 0 for value in expected.values()) and recurrent
    assert any(name.startswith(f"low_rank.{recurrent[0]}.") for name in expected)
    for plan in (StepPlan(), StepPlan(slice_rows=12), StepPlan(slice_rows=12, grad_checkpoint=True)):
        with closing(StepRunner(attached, OBJECTIVE, choice, seed=0, plan=plan)) as runner:
            count, found, ours = runner._micro_batch(rows, 5)
        assert count == len(layout.rows)
        np.testing.assert_allclose(found.total.item(), total.item(), rtol=1e-5)
        assert relative(dict(tree_flatten(ours)), expected) < 1e-4


@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h"])
def test_a_lead_and_tokens_in_place_of_slots(name: str) -> None:
    """What Parallel Token Prediction and online self-distillation run: the same rows as one pass per anchor."""
    model = tiny_model(name, seed=3)
    attached = attach(model, random_adapter(model))
    sequences = [[3, 5, 7, 11, 90, 2, 4, 8, 9, 6], [4, 9, 2, 30, 7]]
    anchors = [np.array([1, 2, 5], dtype=np.int32), np.array([2], dtype=np.int32)]
    layout = build_layout(sequences, anchors, 1, chunk_blocks=2, lead=1)
    prefix = prefix_pass(attached, layout)
    tokens = mx.arange(3, 3 + layout.block.size).reshape(-1, layout.chunk_rows)
    for part in layout.parts():
        slots = every_slot_pass(attached, layout, prefix, part)
        real = token_pass(attached, layout, prefix, part, tokens[part.chunks].reshape(-1))
        given, rows, found = tokens[part.chunks].reshape(1, -1), 2, layout.blocks(part)[0].tolist()
        for number, anchor in enumerate(sorted(set(found))):  # the others fill a chunk up
            own, text = slice(2 * number, 2 * number + rows), sequences[part.sequence][: anchor + 1]
            cache = attached.make_cache()
            attached.forward(Block.real(mx.array([text])), cache)
            positions = mx.arange(anchor, anchor + rows)[None]
            block = Block(attached.vocab_size + mx.arange(rows)[None], n_real=0, positions=positions)
            np.testing.assert_allclose(slots[own], attached.forward(block, cache)[0], rtol=1e-3, atol=1e-4)
            alone = attached.make_cache()
            attached.forward(Block.real(mx.array([text])), alone)
            placed = Block(given[:, own], n_real=rows, positions=positions)
            np.testing.assert_allclose(real[own], attached.forward(placed, alone)[0], rtol=1e-3, atol=1e-4)


def test_one_pass_over_text_and_slots_is_refused(tmp_path: Path) -> None:
    model = tiny_model("lfm2", seed=3)
    settings = settings_for(tmp_path / "out", "conf-adapt", tuning="lora", draft_vocab=0)
    with pytest.raises(
        MTPError, match="in one pass, and this model's recurrent state reads every row of a pass"
    ):
        make_trainer(model, examples(4), [], settings, Remembering())
    adapter = random_ptp_adapter(model, variant="c")
    with pytest.raises(
        MTPError, match="in one pass, and this model's recurrent state reads every row of a pass"
    ):
        InverseAR(attach(model, adapter), slots=2, anchors=2)


WORDS = 12  # of the language that a tiny model writes, whose words mostly depend on those right before them


def writer(name: str) -> Any:
    """A model of that language."""
    few: dict[str, Any] = {"vocab_size": WORDS, **({"num_hidden_layers": 2} if "qwen" in name else {})}
    model = tiny_model(name, seed=3, **({"text_config": {**QWEN3_5, **few}} if name == "qwen3_5" else few))
    embedding = find_seams(model).embedding
    embedding.weight = 4 * embedding.weight
    return model


def texts(name: str, count: int, seed: int) -> list[Example]:
    """What it writes after two random words."""
    model, random, found = attach(writer(name)), np.random.default_rng(seed), []
    for _ in range(count):
        prompt = random.integers(0, WORDS, 2).tolist()
        found.append(
            Example([*prompt, *(item.token for item in mtp_generate_step(prompt, model, max_tokens=10))], 2)
        )
    return found


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "granitemoehybrid", "lfm2", "nemotron_h"])
def test_thirty_steps_draft_better_than_chance(name: str, tmp_path: Path) -> None:
    """On texts that were not trained on, which stay as they are."""
    few = {"steps": 30, "warmup": 2, "batch_size": 3, "micro_batches": 1, "slots": 2, "block_share": 0.4}
    settings = settings_for(tmp_path / "out", learning_rate=1e-2, measure_every=99, save_every=99, **few)
    trainer, others = (
        make_trainer(writer(name), texts(name, 16, 0), [], settings, Remembering()),
        texts(name, 8, 1),
    )
    assert trainer.run()
    first, *_ = trainer.method.measure([others]).acceptance
    assert first > 1.5 / WORDS
    model, stats = writer(name), DecodeStats()
    attached = attach(model, load_folder(tmp_path / "out", model)[0])
    for example in others[:3]:
        policy = FixedPolicy("linear", 2)
        found = mtp_generate_step(example.tokens[:2], attached, max_tokens=10, policy=policy, stats=stats)
        assert [item.token for item in found] == example.tokens[2:]
    assert sum(stats.accepted) > 0
