"""Proves that heads of every family can be trained on: as they are run, and written back in their own convention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

import mtp_mlx.cli as cli
from mtp_mlx import load, stream_generate
from mtp_mlx.adapter_folder import read_header, read_tensors
from mtp_mlx.drafters.heads.config import config_of
from mtp_mlx.drafters.heads.draft_heads import heads_of
from mtp_mlx.drafters.heads.stored import is_quantised
from mtp_mlx.drafters.heads.trunk_states import last_state, read_states
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.train.data import Example
from mtp_mlx.train.trainer import Trainer
from tests.convert.heads.numpy_layers import Array
from tests.convert.heads.parity_families import FAMILIES
from tests.convert.heads.parity_setup import TOKENS, Parity
from tests.convert.heads.test_parity_independent import head_logits, medusa, meta
from tests.tiny import save_tiny
from tests.train.training import Remembering, make_trainer, settings_for

TEXT = Example(TOKENS, 1)


def trainer_for(model: nn.Module, out: Path, start: Path, listener: Any = None, **changes: Any) -> Trainer:
    """A run of three steps on one text, on cross-entropy over all ids."""
    values: dict[str, Any] = {"start_from": start, "heads": None, "draft_vocab": 0, "steps": 3, "warmup": 0}
    values |= {"batch_size": 1, "micro_batches": 1, "schedule": "constant", "learning_rate": 2e-4}
    values |= {"kl_weight": 0.0, "measure_every": 1, "save_every": 9}
    settings = settings_for(out, method="mtp-heads", **values | changes)
    return make_trainer(model, [TEXT], [TEXT], settings, listener or Remembering())


def cross_entropies(logits: list[Array]) -> dict[str, float]:
    """Of what the heads predict behind each position of TOKENS."""
    found = {}
    for depth, rows in enumerate(logits, start=1):
        rows = np.asarray(rows[: len(TOKENS) - depth - 1], dtype=np.float64)
        labels = np.array(TOKENS[depth + 1 :])
        sums = np.log(np.exp(rows).sum(-1))
        found[f"head {depth}"] = float(np.mean(sums - rows[np.arange(len(labels)), labels]))
    return found


def acceptance(logits: list[Array]) -> list[float]:
    """At every position that all depths follow."""
    count = len(TOKENS) - 1 - len(logits)
    right = [
        np.asarray(rows)[:count].argmax(-1) == np.array(TOKENS[depth + 1 : depth + 1 + count])
        for depth, rows in enumerate(logits, start=1)
    ]
    reached, shares = np.ones(count, dtype=bool), []
    for one in right:
        shares.append(float((one & reached).sum() / reached.sum()) if reached.any() else 0.0)
        reached &= one
    return shares


def check_trained(model: nn.Module, folder: Path, start: Path, out: Path, logits: list[Array]) -> None:
    """Trains, compares what is trained with `logits`, and loads and decodes what was written.

    Args:
        folder: the base model's. start: of its heads. logits: of these over TOKENS.
    """
    listener = Remembering()
    trainer = trainer_for(model, out, start, listener)
    theirs = config_of(start, read_header(start))
    depths = heads_of(trainer.attached).drafts
    assert depths == theirs.drafts == len(logits)
    before = trainer.method.measure([[TEXT]])
    assert before.acceptance == acceptance(logits)
    assert trainer.run()
    first, *_, last = listener.steps
    expected = cross_entropies(logits)
    for name, value in expected.items():
        assert first.parts[name] == pytest.approx(value, rel=2e-3), name
    assert last.loss < first.loss
    header = read_header(out)
    assert config_of(out, header) == theirs and header.source == read_header(start).source
    cards = [(one / "README.md").read_text() for one in (start, out)]
    assert [", then trained by mtp-mlx." in card for card in cards] == [
        False,
        bool(header.source.get("files")),
    ]
    stored, written = read_tensors(start), read_tensors(out)
    assert {name: (value.shape, value.dtype) for name, value in stored.items()} == {
        name: (value.shape, value.dtype) for name, value in written.items()
    }
    changed = {name for name, value in stored.items() if not mx.array_equal(value, written[name])}
    kept = {name for name in stored if name.split(".")[2] in ("embed_tokens", "lm_head")}
    assert len(changed) > len(stored) / 2 and not changed & kept
    same_text(folder, out)


def same_text(folder: Path, heads: Path) -> None:
    model, tokenizer = load(str(folder), heads)
    found = [token.token for token in stream_generate(model, tokenizer, TOKENS[:9], 10, layout="linear")]
    bare, _ = load_model(folder)
    theirs = [int(token) for token, _ in generate_step(mx.array(TOKENS[:9]), bare, max_tokens=10)]
    assert len(found) > 1 and found == theirs[: len(found)]  # or one that ends the text


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_cascade(tmp_path: Path, name: str) -> None:
    parity = Parity.of(name, tmp_path)
    drafts = config_of(parity.heads_folder, parity.info).drafts
    attached_logits = parity.logits
    model, _ = load_model(parity.folder)
    check_trained(model, parity.folder, parity.heads_folder, tmp_path / "out2", attached_logits[:drafts])


@pytest.mark.parametrize("first", ["pre-norm", "before-last-layer"])
def test_another_first_state_and_cached_states(tmp_path: Path, first: str) -> None:
    parity = Parity.of("mimo-7b", tmp_path, first_hidden=first)
    drafts = config_of(parity.heads_folder, parity.info).drafts
    logits = parity.logits[:drafts]
    model, _ = load_model(parity.folder)
    check_trained(model, parity.folder, parity.heads_folder, tmp_path / "out2", logits)
    trainer = trainer_for(load_model(parity.folder)[0], tmp_path / "out3", parity.heads_folder)
    states, last = trainer.method._states([TEXT]), trainer.attached.model.model(mx.array([TOKENS]))
    assert mx.array_equal(last_state(trainer.attached, states), last), (
        "what teaches is the last state all the same"
    )
    assert not mx.allclose(read_states(trainer.attached, states), last, atol=1e-2).item()
    losses = []
    for cache in (None, tmp_path / "states"):
        listener = Remembering()
        model, _ = load_model(parity.folder)
        changes = {"kl_weight": 1.0, "hidden_cache": cache}
        out = tmp_path / f"with {cache is not None}"
        assert trainer_for(model, out, parity.heads_folder, listener, **changes).run()
        losses.append(listener.steps[-1].loss)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert [path.name.endswith(first) for path in (tmp_path / "states").iterdir()] == [True]


@pytest.mark.parametrize("make", [medusa, meta])
def test_independent_heads(tmp_path: Path, make: Any) -> None:
    folder, heads_folder, _ = make(tmp_path)
    model, tokenizer = load(str(folder), heads_folder)
    logits = head_logits(model, TOKENS)[1:]
    bare, _ = load_model(folder)
    check_trained(bare, folder, heads_folder, tmp_path / "out2", logits)
    bare, _ = load_model(folder)
    with pytest.raises(MTPError, match="for which `extend` has no meaning"):
        trainer_for(bare, tmp_path / "c", heads_folder, extend="2x")


@pytest.mark.parametrize("name", ["glm-4.5", "step-3.5"])
def test_a_quantised_base_and_quantised_heads(tmp_path: Path, name: str) -> None:
    parity = Parity.of(name, tmp_path)

    def base() -> nn.Module:
        model, _ = load_model(parity.folder)
        nn.quantize(model, 32, 8, class_predicate=lambda _, layer: _wide(layer))
        return model

    assert trainer_for(base(), tmp_path / "a", parity.heads_folder, store="8bit").run()
    assert list(read_header(tmp_path / "a").acceptance_by_precision)[0].startswith("mixed: 8-bit, float32 (")
    again = trainer_for(base(), tmp_path / "b", tmp_path / "a")
    assert not is_quantised(again.method.module) and again.run()
    heads, _ = load_folder(tmp_path / "b", base())
    assert is_quantised(heads) and heads.convention == parity.heads.convention
    same_text(parity.folder, tmp_path / "b")


def _wide(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and layer.weight.shape[-1] % 32 == 0


def test_the_number_of_heads_is_that_of_the_folder_unless_another_is_named(tmp_path: Path) -> None:
    parity, listener = Parity.of("llama with own heads", tmp_path), Remembering()
    trainer = trainer_for(load_model(parity.folder)[0], tmp_path / "a", parity.heads_folder, listener)
    assert (
        trainer.method.depth == 2
        and f"trained: 2 drafts a step, as in {parity.heads_folder}" in listener.messages
    )
    with pytest.raises(MTPError, match="has 2 heads, and `heads` is 3: set `heads` to 2"):
        trainer_for(load_model(parity.folder)[0], tmp_path / "b", parity.heads_folder, heads=3)


def test_from_the_command_line(tmp_path: Path) -> None:
    """As docs/training.md says it, with heads that read the state before the last norm."""
    base, data = save_tiny(tmp_path / "model", "llama", seed=3), tmp_path / "answers.jsonl"
    rows = [{"prompt": "a", "completion": "the sky is blue, the sky is wide"}] * 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(out: Path, *options: str) -> str:
        arguments = ["train", "mtp-heads", "--model", str(base), "--data", str(data), "--out", str(out)]
        result = CliRunner().invoke(cli.main, [*arguments, "--steps", "2", *options])
        assert result.exit_code == 0, result.output
        return " ".join(result.stderr.split())

    inside = base / "mtp"
    run(inside, "--heads", "2", "--draft-vocab", "60")
    config = json.loads((inside / "mtp_config.json").read_text())
    config["heads"]["convention"] |= {"first_hidden": "pre-norm", "recycled_hidden": "raw"}
    (inside / "mtp_config.json").write_text(json.dumps(config))
    assert "trained: 2 drafts a step, as in" in run(tmp_path / "heads", "--start-from", str(inside))
    header = read_header(tmp_path / "heads")
    assert header.own["heads"]["convention"] == config["heads"]["convention"]
    assert header.training["start_from"] == "mtp" and header.training["heads"] == 2
    own, kept = (read_tensors(folder)["draft_ids"] for folder in (inside, tmp_path / "heads"))
    assert mx.array_equal(own, kept) and len(own) == 60, "the draft vocabulary is kept"
    same_text(base, tmp_path / "heads")
