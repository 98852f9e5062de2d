"""Proves looped extension: heads are copied group by group, what was trained stays, the new group alone learns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mtp_mlx.adapter_folder import read_header, read_tensors
from mtp_mlx.api import generate, load
from mtp_mlx.drafters.heads.agreement import measure_heads
from mtp_mlx.drafters.heads.folder import config_of
from mtp_mlx.drafters.heads.start import extended_count
from mtp_mlx.drafters.heads.trunk_states import ComputedStates
from mtp_mlx.errors import MTPError
from mtp_mlx.train.trainer import Trainer
from tests.tiny import save_tiny, tiny_model
from tests.train.training import Remembering, examples, trainer_for

# A linear layer of head i, by which heads are told apart.
FUSE = "heads.{}.fuse.weight"


def extending(out: Path, start: Path, listener: Any = None, **changes: Any) -> Trainer:
    values: dict[str, Any] = {"steps": 4, "extend": "2x", "heads": None, **changes}
    return trainer_for(out, listener, method="mtp-heads", start_from=start, **values)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two trained heads."""
    folder = tmp_path_factory.mktemp("two") / "heads"
    assert trainer_for(folder, method="mtp-heads", heads=2, steps=5, learning_rate=5e-3).run()
    return folder


def test_a_new_group_is_a_copy_of_all_heads_in_order(tmp_path: Path, two: Path) -> None:
    listener = Remembering()
    tensors = extending(tmp_path / "four", two, listener).method.tensors()
    assert f"2 heads of {two} are frozen; 2 copies are trained" in listener.messages
    assert {name.split(".")[1] for name in tensors} == {"0", "1", "2", "3"}
    assert not mx.array_equal(tensors[FUSE.format(0)], tensors[FUSE.format(1)])
    for name, value in tensors.items():
        _, index, rest = name.split(".", 2)
        assert mx.array_equal(value, tensors[f"heads.{int(index) % 2}.{rest}"]), name
    three = extending(tmp_path / "three", two, extend="3").method.tensors()
    assert mx.array_equal(three[FUSE.format(2)], three[FUSE.format(0)]) and FUSE.format(3) not in three


def test_only_the_new_group_learns(tmp_path: Path, two: Path) -> None:
    listener = Remembering()
    trainer = extending(tmp_path / "four", two, listener, learning_rate=5e-3)
    start = {name: np.array(value) for name, value in trainer.method.tensors().items()}
    assert trainer.run()
    assert set(listener.steps[0].parts) == {"ce", "kl", "head 3", "head 4"}
    for name, value in trainer.method.tensors().items():
        assert np.array_equal(np.array(value), start[name]) == (name.split(".")[1] in "01"), name
    before, after = read_tensors(two), read_tensors(tmp_path / "four")
    for name, value in before.items():
        assert mx.array_equal(value, after[name]), f"{name}: the earlier group is the folder's, bit for bit"
    info = read_header(tmp_path / "four")
    config = config_of(tmp_path / "four", info)
    assert len(config.blocks) == config.drafts == len(info.acceptance) == 4
    assert info.training["heads"] == 4 and info.training["extend"] == "2x"
    assert info.training["start_from"] == "heads"


def test_extended_heads_decode_and_grow_again(tmp_path: Path, two: Path) -> None:
    assert extending(tmp_path / "four", two).run()
    assert extending(tmp_path / "eight", tmp_path / "four", max_length=64).run()
    save_tiny(tmp_path / "model", "qwen3", seed=3)
    base, tokenizer = mlx_lm.load(str(tmp_path / "model"))[:2]
    expected = mlx_lm.generate(base, tokenizer, "The sky", max_tokens=20)
    for folder, drafts in (("four", 4), ("eight", 8)):
        attached, tokenizer = load(str(tmp_path / "model"), tmp_path / folder)
        assert attached.most_drafts == drafts
        assert generate(attached, tokenizer, "The sky", 20, layout="linear") == expected


def test_an_extension_goes_on_after_a_stop(tmp_path: Path, two: Path) -> None:
    whole = extending(tmp_path / "whole", two, save_every=2)
    assert whole.run()
    first = extending(tmp_path / "cut", two, save_every=2)
    first._one_step()
    first._one_step()
    first.save()
    second = extending(tmp_path / "cut", two, save_every=2)
    assert second.resume() and second.step == 2 and second.run()
    for name, value in whole.method.tensors().items():
        assert mx.array_equal(value, second.method.tensors()[name]), name


def test_a_loop_without_training_is_an_extension_without_steps(tmp_path: Path, two: Path) -> None:
    """Two heads applied again in turn accept what four do of which two are copies."""
    looped = trainer_for(tmp_path / "two", method="mtp-heads", heads=2, start_from=two)
    extended = extending(tmp_path / "four", two)
    rows = [examples()]
    found = [measure_heads(t.attached, rows, 4, ComputedStates(t.attached)) for t in (looped, extended)]
    assert found[0].acceptance == found[1].acceptance and found[0].blocks > 0


@pytest.mark.parametrize(("field", "value"), [("first_hidden", "pre-norm"), ("lm_head", "own")])
def test_heads_of_another_convention_are_extended_in_it(
    tmp_path: Path, two: Path, field: str, value: str
) -> None:
    folder = shutil.copytree(two, tmp_path / "heads")
    config = json.loads((folder / "mtp_config.json").read_text())
    config["heads"]["convention"][field] = value
    (folder / "mtp_config.json").write_text(json.dumps(config))
    if field == "lm_head":
        model = tiny_model("qwen3", seed=3)
        own = {f"heads.{i}.lm_head.weight": model.model.embed_tokens.weight for i in range(2)}
        mx.save_safetensors(str(folder / "mtp.safetensors"), read_tensors(folder) | own)
    assert extending(tmp_path / "four", folder).run()
    found = read_header(tmp_path / "four")
    assert found.own["heads"]["convention"][field] == value
    before, after = read_tensors(folder), read_tensors(tmp_path / "four")
    assert all(
        mx.array_equal(value, after[name]) and value.dtype == after[name].dtype
        for name, value in before.items()
    )
    if field == "lm_head":
        assert mx.array_equal(after["heads.3.lm_head.weight"], own["heads.1.lm_head.weight"]), "kept as it is"


@pytest.mark.parametrize(
    ("extend", "trained", "count"), [("2x", 1, 2), ("2x", 4, 8), ("2", 1, 2), ("5", 4, 5), ("8", 4, 8)]
)
def test_counts(extend: str, trained: int, count: int) -> None:
    assert extended_count(extend, trained) == count


@pytest.mark.parametrize(
    ("extend", "message"),
    [
        ("3x", "`extend` must be 2x or a number of heads, not '3x'"),
        (
            "4",
            "one run extends 4 heads by a group of up to 4, so give 5 to 8; for more, extend the result again",
        ),
        ("9", "`extend` is 9: one run extends 4 heads"),
        ("-1", "`extend` must be 2x or a number"),
    ],
)
def test_counts_refused(extend: str, message: str) -> None:
    with pytest.raises(MTPError, match=message):
        extended_count(extend, 4)
