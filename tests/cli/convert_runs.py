"""How tests call `mtp-mlx convert` and `info`, and checkpoints that several of them convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from tests.convert.checkpoints import write_safetensors
from tests.convert.heads.head_checkpoints import make, numbers
from tests.tiny import save_tiny


def run(*args: Any) -> Result:
    return CliRunner().invoke(cli.main, list(map(str, args)))


def refused(*args: Any) -> str:
    """The one sentence on stderr of a command that ends with exit code 2 and prints nothing else."""
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith(cli.HOW_TO_MEND[:20])]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


def llama_with_heads(folder: Path) -> Path:
    """A tiny llama of `tests.tiny` with two random heads under DeepSeek's names."""
    save_tiny(folder, seed=3, num_hidden_layers=4)
    made = make("llama with own heads")
    stored: Any = mx.load(str(folder / "model.safetensors"))
    heads = {name: value for name, value in made.stored.items() if name.startswith("model.layers.")}
    widths = {56: 80}
    for name, value in heads.items():
        shape = tuple(widths.get(n, n) for n in value.shape)
        heads[name] = numbers(name, shape) * np.float32(0.2)
    write_safetensors(folder / "model.safetensors", {n: np.array(v) for n, v in stored.items()} | heads)
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def medusa(folder: Path) -> dict[str, np.ndarray]:
    """Medusa's tensors, and the folder for them."""
    folder.mkdir()
    shapes = {"0.0.linear.weight": (8, 8), "0.0.linear.bias": (8,), "0.1.weight": (9, 8)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
