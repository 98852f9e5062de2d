"""Proves that training MTP heads learns, leaves the base alone, and ends in a folder that decodes the same text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.api import load, stream_generate
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.train.checkpoint import load_checkpoint
from mtp_mlx.train.data import Example
from mtp_mlx.train.trainer import Trainer
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.train.training import Remembering, examples, make_trainer, settings_for, trainer_for


def heads_trainer(out: Path, listener: Any = None, model: Any = None, **changes: Any) -> Trainer:
    return trainer_for(out, listener, model, method="mtp-heads", **changes)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(tree)}


@pytest.fixture(scope="module")
def own_text() -> list[Example]:
    """Greedy answers of the tiny model itself."""
    model, tokenizer = tiny_model("qwen3", seed=3), tiny_tokenizer()
    rows = []
    for prompt in ("The sky", "print(add", "The fox and", "In the word"):
        ids = tokenizer.encode(prompt)
        tokens, cache = list(ids), mlx_lm.models.cache.make_prompt_cache(model)
        for _ in range(40):
            logits = model(mx.array([tokens[cache[0].offset :]]), cache=cache)
            tokens.append(mx.argmax(logits[0, -1]).item())
        rows.append(Example(tokens, len(ids)))
    return rows


@pytest.mark.parametrize("weights", [{}, {"kl_weight": 0.0}, {"ce_weight": 0.0, "top_share": 0.5}], ids=str)
def test_trained_heads_draft_and_the_text_stays(
    tmp_path: Path, own_text: list[Example], weights: dict[str, float]
) -> None:
    """Sixty steps on the model's own answers; then the folder drafts them, and the text is mlx-lm's."""
    listener = Remembering()
    model = tiny_model("qwen3", seed=3)
    settings = settings_for(
        tmp_path / "heads",
        method="mtp-heads",
        steps=60,
        learning_rate=5e-3,
        draft_vocab=0,
        measure_every=0,
        **weights,
    )
    trainer = make_trainer(model, own_text, own_text, settings, listener)
    assert trainer.run()
    losses = [report.loss for report in listener.steps]
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5]), losses
    assert set(listener.steps[0].parts) == {"head 1", "head 2", "head 3"} | {
        name for name in ("ce", "kl") if weights.get(f"{name}_weight", 1.0)
    }
    save_tiny(tmp_path / "model", "qwen3", seed=3)
    base, tokenizer = mlx_lm.load(str(tmp_path / "model"))[:2]
    expected = mlx_lm.generate(base, tokenizer, "The sky", max_tokens=40)
    attached, tokenizer = load(str(tmp_path / "model"), tmp_path / "heads")
    responses = list(stream_generate(attached, tokenizer, "The sky", 40, layout="linear"))
    assert "".join(response.text for response in responses) == expected
    stats = responses[-1].stats
    assert stats.accepted[0] > 0 and stats.tokens_per_step > 2, stats
    assert trainer.agreement is not None and trainer.agreement.acceptance[0] > 0.5
    assert attached.info.training["method"] == "mtp-heads" and attached.info.training["steps"] == 60
    assert "rank" not in attached.info.training, "settings of another method are none of its provenance"
    assert attached.info.acceptance == trainer.agreement.acceptance


@pytest.mark.parametrize("quantized", [False, True])
def test_the_base_stays_as_it_was(tmp_path: Path, quantized: bool) -> None:
    """Weights bit for bit; every tensor of the heads moves, and what is exported is what was trained."""

    def build() -> Any:
        model = tiny_model("qwen3", seed=3, hidden_size=64, intermediate_size=96)
        if quantized:
            nn.quantize(model, group_size=32, bits=4)
        mx.eval(model.parameters())
        return model

    model = build()
    before = flat(model.parameters())
    trainer = heads_trainer(tmp_path / "heads", model=model, steps=3)
    start = {name: np.array(value) for name, value in trainer.method.tensors().items()}
    assert trainer.run()
    after = {name: np.array(value) for name, value in trainer.method.tensors().items()}
    assert not [name for name in start if np.array_equal(start[name], after[name])]
    assert all(np.array_equal(before[name], value) for name, value in flat(model.parameters()).items())
    heads, info = load_folder(tmp_path / "heads", build())
    assert (
        len(heads.heads) == heads.drafts == 3 and heads.draft_ids is not None and len(heads.draft_ids) == 60
    )
    heads.set_dtype(mx.float32)
    for name, value in flat(heads.parameters()).items():
        np.testing.assert_allclose(value, after[name], rtol=0.01, atol=1e-6)  # bfloat16


@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "olmoe"])
def test_other_architectures(tmp_path: Path, architecture: str) -> None:
    listener = Remembering()
    trainer = heads_trainer(
        tmp_path / "heads", listener, tiny_model(architecture, seed=3), steps=12, learning_rate=5e-3
    )
    assert trainer.run()
    losses = [report.loss for report in listener.steps]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3]), losses


# --- how it learns ------------------------------------------------------------------------------------------


def test_copied_layers_learn_at_a_rate_of_their_own(tmp_path: Path) -> None:
    """With Adam the first update of a weight is the rate; that of a block's is a quarter of it, or nothing."""

    def moved(rate: float) -> dict[str, float]:
        trainer = heads_trainer(tmp_path / str(rate), steps=1, warmup=0, block_rate=rate, layers=2)
        before = {name: np.array(value) for name, value in trainer.method.tensors().items()}
        trainer._one_step()
        after = {name: np.array(value) for name, value in trainer.method.tensors().items()}
        return {name: float(np.abs(after[name] - before[name]).max()) for name in before}

    whole, quarter, none = moved(1.0), moved(0.25), moved(0.0)
    for name, change in whole.items():
        expected = change / 4 if ".block." in name else change
        assert change > 0 and quarter[name] == pytest.approx(expected, rel=2e-2), name
        assert (none[name] == 0) == (".block." in name), name


def test_without_cross_entropy_the_next_token_does_not_matter(tmp_path: Path) -> None:
    """Another last token leaves the loss as it is: nothing but labels depends on it."""

    def losses(ce_weight: float) -> list[float]:
        found = []
        for last in (5, 99):
            data = [Example([*row.tokens, last], row.loss_start) for row in examples()[:2]]
            settings = settings_for(
                tmp_path / "a", "mtp-heads", steps=1, warmup=0, heads=1, draft_vocab=0, ce_weight=ce_weight
            )
            trainer = make_trainer(tiny_model("qwen3", seed=3), data, [], settings, listener := Remembering())
            trainer._one_step()
            found.append(listener.steps[0].loss)
        return found

    silent, loud = losses(0.0), losses(1.0)
    assert silent[0] == pytest.approx(silent[1], rel=1e-6)
    assert loud[0] != pytest.approx(loud[1], rel=1e-3)


def test_the_old_name_of_learn_from(tmp_path: Path) -> None:
    def first_step(**changes: Any) -> tuple[int, list[str]]:
        listener = Remembering()
        trainer = heads_trainer(tmp_path / "a", listener, steps=1, warmup=0, **changes)
        trainer._one_step()
        return listener.steps[0].rows, [line for line in listener.messages if "learn_from" in line]

    responses, everything = first_step(), first_step(learn_from="all")
    assert everything[0] > responses[0] and responses[1] == everything[1] == []
    assert first_step(learn_prompts=True) == (
        everything[0],
        ["`learn_prompts` is now called `learn_from` all"],
    )


def test_a_row_without_a_response_teaches_by_its_prompt(tmp_path: Path) -> None:
    row = Example([5, 6, 7, 8, 9, 10], 6)

    def trainer(learn_from: str) -> Trainer:
        settings = settings_for(
            tmp_path / "a", "mtp-heads", steps=1, warmup=0, draft_vocab=0, learn_from=learn_from
        )
        return make_trainer(tiny_model("qwen3", seed=3), [row], [], settings, Remembering())

    with pytest.raises(MTPError, match="no training row is long enough"):
        trainer("responses")
    learning = trainer("all")
    learning._one_step()
    assert learning.listener.steps[0].rows % (4 + 3 + 2) == 0


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ce_weight": 0.0, "kl_weight": 0.0}, "`ce_weight` and `kl_weight` are both 0"),
        ({"top_share": 0.0}, "`top_share` 0 leaves nothing to distil"),
        ({"block_share": 0.0}, "`block_share` 0 leaves no position to train on"),
        ({"extend": "2x"}, "`extend` needs trained heads: name their folder with `start_from`"),
        ({"extend": "2x", "heads": 3}, "leave `heads` out"),
        ({"heads": 10, "max_length": 11}, "`max_length` 11 is too short for 10 heads, which take 12 tokens"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MTPError, match=message):
        settings_for(Path("out"), **{"method": "mtp-heads", **changes})


def test_rows_too_short(tmp_path: Path) -> None:
    model, listener = tiny_model("qwen3", seed=3), Remembering()
    short = Example([5, 6], 1)
    settings = settings_for(tmp_path / "a", method="mtp-heads", steps=3, warmup=0)
    trainer = make_trainer(model, [*examples(4), short], [short], settings, listener)
    assert listener.messages == [
        "1 rows left out: head 1 predicts from token 3 on, and their responses end before it"
    ]
    assert trainer.run() and trainer.agreement is None
    assert any("no held-out response has 4 tokens" in message for message in listener.messages)
    with pytest.raises(MTPError, match="no training row is long enough: head 1 needs rows of 3 tokens"):
        make_trainer(tiny_model("qwen3", seed=3), [short], [], settings, listener)


def test_rows_too_short_for_a_copy(tmp_path: Path) -> None:
    """In looped extension the first head that is trained is a copy, which looks further than head 1."""
    first = heads_trainer(tmp_path / "first", steps=3)
    assert first.run()
    count, listener = len(first.method.module.heads), Remembering()
    settings = replace(
        first.settings,
        start_from=tmp_path / "first",
        extend="2x",
        heads=None,
        out=tmp_path / "second",
        batch_size=1,
    )
    short = Example(list(range(5, 5 + count + 2)), 0)
    trainer = make_trainer(tiny_model("qwen3", seed=3), [*examples(2), short, short], [], settings, listener)
    assert f"2 rows left out: head {count + 1} predicts from token {count + 3} on" in str(listener.messages)
    assert trainer.run()


def test_starting_from_other_heads(tmp_path: Path) -> None:
    first = heads_trainer(tmp_path / "first", steps=3)
    assert first.run()
    listener = Remembering()
    second = heads_trainer(
        tmp_path / "second", listener, start_from=tmp_path / "first", draft_vocab=61, steps=3
    )
    assert "another draft vocabulary" in str(listener.messages)
    for name, value in second.method.tensors().items():
        np.testing.assert_allclose(
            np.array(value), np.array(first.method.tensors()[name]), rtol=0.01, atol=1e-6
        )
    assert second.run()
    assert (
        json.loads((tmp_path / "second" / "mtp_config.json").read_text())["training"]["start_from"] == "first"
    )
    with pytest.raises(
        MTPError, match="has 3 heads, and `heads` is 2: set `heads` to 3, or `extend` to get more"
    ):
        heads_trainer(tmp_path / "third", start_from=tmp_path / "first", heads=2)
    with pytest.raises(MTPError, match="is not an adapter folder"):
        heads_trainer(tmp_path / "third", start_from=tmp_path / "none")
    with pytest.raises(MTPError, match="was made for base"):
        heads_trainer(tmp_path / "third", model=tiny_model("qwen3", seed=4), start_from=tmp_path / "first")


def test_a_checkpoint_of_the_other_method_is_refused(tmp_path: Path) -> None:
    heads_trainer(tmp_path / "a").save()
    with pytest.raises(MTPError, match="method was 'mtp-heads', now 'mask-tokens'"):
        trainer_for(tmp_path / "a").resume()
    assert load_checkpoint(tmp_path / "a.checkpoint.safetensors").step == 0


@pytest.mark.parametrize("shape", [{}, {"shared": True, "layers": 2, "taps": "low,middle,last"}], ids=str)
def test_memory_is_estimated_within_a_factor_of_two(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = tiny_model("llama", seed=3, hidden_size=96, intermediate_size=192)
    rows = [Example(np.random.default_rng(0).integers(3, 157, 90).tolist(), 4)] * 4
    settings = settings_for(
        tmp_path / "a", method="mtp-heads", micro_batches=1, loss_rows=512, draft_vocab=0, **shape
    )
    trainer = make_trainer(model, rows, [], settings, Remembering())
    estimate = trainer.estimate
    mx.clear_cache()
    mx.reset_peak_memory()
    trainer._one_step()
    used = mx.get_peak_memory() - mx.get_active_memory() + estimate.weights + estimate.adapter
    assert 0.5 < (estimate.total - estimate.process) / used < 2, (str(estimate), used)


def test_prompts_are_learnt_from_too(tmp_path: Path) -> None:
    """A step is that of the same rows without prompts; which ids may be drafted goes by the responses."""
    rows = [Example([2] * 6 + example.tokens, 6) for example in examples()]  # no response has token 2
    whole = [replace(example, loss_start=1) for example in rows]

    def first_step(name: str, data: list[Example], draft_vocab: int, **changes: Any) -> tuple[Any, Any]:
        listener, out = Remembering(), tmp_path / f"{name} {draft_vocab}"
        settings = settings_for(
            out, method="mtp-heads", steps=1, warmup=0, draft_vocab=draft_vocab, **changes
        )
        trainer = make_trainer(tiny_model("qwen3", seed=3), data, rows[:3], settings, listener)
        assert trainer.run()
        return listener.steps[0], trainer.method.heads.draft_ids

    found, _ = first_step("prompts too", rows, 0, learn_from="all")
    expected, _ = first_step("whole", whole, 0)
    assert (found.loss, found.rows) == (expected.loss, expected.rows)
    assert found.rows > first_step("responses", rows, 0)[0].rows
    assert 2 in first_step("whole", whole, 9)[1].tolist()
    assert 2 not in first_step("prompts too", rows, 9, learn_from="all")[1].tolist()
