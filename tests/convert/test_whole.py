"""Proves that whole checkpoints of every family become mlx-lm folders with their heads beside, and nothing is lost."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mtp_mlx.convert.whole import WholeSettings, convert_whole, report_lines
from mtp_mlx.errors import MTPError

from .checkpoints import bf16, write_safetensors, write_shards
from .head_checkpoints import numbers
from .torch_files import Tensor, write_torch, write_zip
from .whole_checkpoints import WHOLE, Whole, config_of, whole, with_tokenizer


def parameters(folder: Path) -> dict[str, mx.array]:
    """What mlx-lm loads from a folder."""
    model, _ = load_model(folder)
    return dict(tree_flatten(model.parameters()))


def assert_holds(folder: Path, made: Whole) -> None:
    """The folder's trunk and heads are the tensors that `made` was written from, bit for bit."""
    loaded = parameters(folder)
    assert loaded.keys() == made.trunk.keys()
    for key, value in made.trunk.items():
        np.testing.assert_array_equal(np.array(loaded[key].astype(mx.float32)), value, err_msg=key)
    heads: Any = mx.load(str(folder / "mtp" / "mtp.safetensors"))
    assert heads.keys() == made.made.canonical.keys()
    for key, value in made.made.canonical.items():
        np.testing.assert_array_equal(np.array(heads[key].astype(mx.float32)), value, err_msg=key)


@pytest.mark.parametrize("name", WHOLE)
def test_every_family(tmp_path: Path, name: str) -> None:
    """mlx-lm's sanitize drops, keeps or chokes on heads; here the trunk is whole and the heads lie beside it."""
    made = whole(name)
    result = convert_whole(made.write(tmp_path / "model"), tmp_path / "out")
    assert_holds(tmp_path / "out", made)
    assert result.left_out == ([] if "ernie" not in name else result.left_out)
    assert result.heads is not None and result.heads.count == len({k.split(".")[1] for k in made.made.canonical})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
