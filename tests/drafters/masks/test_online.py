"""Proves that the online loss equals an independent numpy form, for gated and ordinary LoRA and a full fine-tune."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.drafters.masks.joint_step import JointRunner, LowRankStudent, WholeStudent
from mtp_mlx.drafters.masks.model_folder import mask_only
from mtp_mlx.drafters.masks.online_loss import Online, Supervision, student_context
from mtp_mlx.drafters.masks.online_step import OnlineRunner
from mtp_mlx.drafters.masks.regions import draw_regions
from mtp_mlx.drafters.masks.weights import new_adapter
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_columns
from tests.drafters.masks import naive_online
from tests.model.naive import NaiveModel, random_adapter
from tests.tiny import VOCABULARY, tiny_model

RANDOM = np.random.default_rng(8)
EXAMPLES = [
    Example(RANDOM.integers(3, VOCABULARY, length).tolist(), start)
    for length, start in ((27, 5), (13, 9), (19, 1))
]
SUPERVISIONS: list[Supervision] = ["hard-teacher", "soft-teacher", "ground-truth"]
K_MOST, REGION_ROWS, SEED = 4, 8, 3


def objective(attached: AttachedModel, supervision: Supervision) -> Online:
    assert attached.speculator is not None
    return Online(supervision, mx.array(draft_columns(attached)), attached.speculator.draft_ids)


def drawn(number: int) -> tuple[int, int]:
    return draw_regions(EXAMPLES, K_MOST, REGION_ROWS, np.random.default_rng((SEED, number)))


def logits_of(naive: NaiveModel, model: Any, gate: float | None) -> naive_online.Rows:
    """Logits of one causal sequence; `gate` on real rows (masks always have 1), or None for a bare model."""

    def rows(tokens: list[int], masks: int) -> np.ndarray:
        ids = [*tokens, *range(naive.vocab_size, naive.vocab_size + masks)]
        naive.gate.rows = mx.array([[gate]] * len(tokens) + [[1.0]] * masks)
        return np.array(model.lm_head(naive.trunk(mx.array([ids])))[0])

    return rows


def naive_pair(architecture: str, adapter: Any, gate: float) -> tuple[naive_online.Rows, naive_online.Rows]:
    """(student, teacher) of a tiny model with an adapter; `gate` is what the student's real rows have."""
    model, plain = tiny_model(architecture, seed=3), tiny_model(architecture, seed=3)
    naive = NaiveModel(model, adapter)
    return logits_of(naive, model, gate), lambda tokens, masks: np.array(plain(mx.array([tokens]))[0])


@pytest.mark.parametrize("chunk_rows", [2048, 5])
@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_gated_lora(supervision: Supervision, chunk_rows: int) -> None:
    adapter = random_adapter(tiny_model("qwen3", seed=3), slots=K_MOST - 1, sampler_width=0, shared_mask=True)
    attached = attach(tiny_model("qwen3", seed=3), adapter)
    runner = OnlineRunner(
        attached, objective(attached, supervision), K_MOST, REGION_ROWS, SEED, 2, chunk_rows
    )
    student, teacher = naive_pair("qwen3", adapter, 0.0)
    for number in range(3):
        found, gradients, rows = runner([EXAMPLES], number)
        expected = naive_online.loss(
            EXAMPLES, *drawn(number), REGION_ROWS, supervision, student, teacher, own_first=False
        )
        assert rows == expected[1] > 3
        assert float(found.total.item()) == pytest.approx(expected[0], rel=1e-4)
        assert float(mx.abs(gradients["slot_embeddings"]["weight"]).max().item()) > 0


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_ordinary_lora(supervision: Supervision) -> None:
    adapter = random_adapter(tiny_model("llama", seed=3), slots=K_MOST - 1, sampler_width=0, shared_mask=True)
    attached = attach(tiny_model("llama", seed=3), adapter)
    runner = JointRunner(
        LowRankStudent(attached), objective(attached, supervision), K_MOST, REGION_ROWS, SEED
    )
    student, teacher = naive_pair("llama", adapter, 1.0)
    for number in range(3):
        found, _, rows = runner([EXAMPLES], number)
        expected = naive_online.loss(
            EXAMPLES, *drawn(number), REGION_ROWS, supervision, student, teacher, own_first=True
        )
        assert rows == expected[1]
        assert float(found.total.item()) == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize("chunk_rows", [2048, 5])
def test_full_fine_tune_and_its_frozen_teacher(chunk_rows: int) -> None:
    """After the weights have moved, the teacher is still the model as it was."""
    model = tiny_model("llama", seed=3)
    adapter = new_adapter(model, mask_only(K_MOST - 1))
    attached = attach(model, adapter)
    runner = JointRunner(
        WholeStudent(attached), objective(attached, "soft-teacher"), K_MOST, REGION_ROWS, SEED, chunk_rows
    )
    moved, other = tiny_model("llama", seed=3), tiny_model("llama", seed=3)
    for trained in (model, moved):
        for name in ("q_proj", "o_proj"):
            layer = trained.model.layers[1].self_attn[name]
            layer.weight = layer.weight * 1.1
    naive = NaiveModel(moved, adapter)
    found, gradients, rows = runner([EXAMPLES], 0)
    expected = naive_online.loss(
        EXAMPLES,
        *drawn(0),
        REGION_ROWS,
        "soft-teacher",
        logits_of(naive, moved, 1.0),
        lambda tokens, masks: np.array(other(mx.array([tokens]))[0]),
        own_first=True,
    )
    assert rows == expected[1]
    assert float(found.total.item()) == pytest.approx(expected[0], rel=1e-4)
    assert float(mx.abs(gradients["lm_head"]["weight"]).max().item()) > 0
    kept = model.model.layers[1].self_attn.q_proj.weight
    assert mx.array_equal(kept, moved.model.layers[1].self_attn.q_proj.weight), "the student is put back"


def test_the_gradient_is_that_of_the_loss() -> None:
    """A small step against the gradient lowers the loss by its length squared: nothing leaks through the picks."""
    adapter = random_adapter(tiny_model("qwen3", seed=3), slots=K_MOST - 1, sampler_width=0, shared_mask=True)
    attached = attach(tiny_model("qwen3", seed=3), adapter)
    runner = OnlineRunner(attached, objective(attached, "hard-teacher"), K_MOST, REGION_ROWS, SEED)
    before, gradients, _ = runner([EXAMPLES], 0)
    gradient = gradients["slot_embeddings"]["weight"]
    step = 1e-3 / float(mx.sqrt(mx.sum(gradient**2)).item())
    adapter.slot_embeddings.weight = adapter.slot_embeddings.weight - step * gradient
    after, _, _ = runner([EXAMPLES], 0)
    fall = float((before.total - after.total).item())
    assert fall == pytest.approx(step * float(mx.sum(gradient**2).item()), rel=0.05)


def test_student_equal_to_the_teacher_has_no_soft_loss() -> None:
    logits = mx.array(RANDOM.normal(size=(5, 11)).astype(np.float32))
    ids = mx.arange(11)
    loss = Online("soft-teacher", ids).rows_loss(logits, logits, mx.zeros((5,), dtype=mx.int32))
    assert np.abs(np.array(loss)).max() < 1e-6


def test_labels_outside_the_draft_vocabulary_teach_nothing() -> None:
    """The teacher's token has no column in the second row, the text's none in the third."""
    draft_ids = mx.array([2, 5, 7], dtype=mx.int32)
    columns = mx.array([-1, -1, 0, -1, -1, 1, -1, 2], dtype=mx.int32)
    logits = mx.array([[0.0, 1.0, 2.0]] * 3)
    teacher = mx.zeros((3, 8)).at[mx.arange(3), mx.array([7, 3, 5])].add(9.0)
    hard = Online("hard-teacher", columns, draft_ids).rows_loss(logits, teacher, mx.array([0, 0, 0]))
    truth = Online("ground-truth", columns, draft_ids).rows_loss(logits, None, mx.array([2, 5, 6]))
    norm = float(np.log(np.exp([0.0, 1.0, 2.0]).sum()))
    assert np.allclose(np.array(hard), [norm - 2, 0, norm - 1], atol=1e-5)
    assert np.allclose(np.array(truth), [norm, norm - 1, 0], atol=1e-5)
    assert Online("hard-teacher", columns, draft_ids).picks(logits).tolist() == [7, 7, 7]


def test_context_is_the_student_s_own_words_shifted_by_one() -> None:
    context = student_context(mx.array([1, 2]), mx.array([[3, 4, 5], [6, 7, 8]]))
    assert context.tolist() == [[1, 3, 4], [2, 6, 7]]
