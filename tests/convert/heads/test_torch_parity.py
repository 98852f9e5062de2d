"""Converted checkpoints of ConfAdapt and of Parallel Token Prediction compute what PyTorch computes, to 1e-4.

Skipped where PyTorch (extra `torch`) is missing; `test_single_mask.py` and `test_ptp.py` prove the same with numpy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mtp_mlx
from mtp_mlx.model.block import Block, block_shape
from tests.convert.adapters import test_ptp as ptp
from tests.convert.adapters.test_single_mask import PROMPT, ROWS, released
from tests.convert.conversions import whole_model
from tests.drafters.ptp.ptp_numpy import embed_uniform
from tests.tiny import VOCABULARY, save_tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def by_torch(folder: Path, architecture: str) -> Any:
    """The folder's model in float32."""
    kind = getattr(transformers, CLASSES[architecture])
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("qwen3", True)])
def test_a_released_mask_token(tmp_path: Path, architecture: str, tied: bool) -> None:
    """Rows of a prompt and of four masks behind it."""
    source = released(tmp_path / "source", architecture, tie_word_embeddings=tied)
    whole_model(source, tmp_path / "out")
    model, _ = mtp_mlx.load(str(tmp_path / "out"))
    ids = mx.array([[*PROMPT, *range(ROWS, ROWS + 4)]])  # slots, which are all the mask
    found = np.array(model.head(model.forward(Block(ids=ids, n_real=len(PROMPT)), model.make_cache()))[0])
    with torch.no_grad():
        expected = by_torch(source, architecture)(torch.tensor([[*PROMPT, *[VOCABULARY] * 4]])).logits[0]
    assert np.abs(found).max() > 1
    assert np.abs(found - expected.numpy()).max() < 1e-4


def low_rank_behind(n_real: int, scale: float, a: np.ndarray, b: np.ndarray) -> Any:
    """A forward hook: rows from `n_real` on get the low-rank update, as with the released gate."""

    def hook(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        update = scale * (inputs[0] @ torch.tensor(a).T @ torch.tensor(b).T)
        gate = (torch.arange(output.shape[1]) >= n_real)[None, :, None]
        return output + gate * update

    return hook


@pytest.mark.parametrize("name", list(ptp.CASES))
def test_a_released_ptp_student(tmp_path: Path, name: str) -> None:
    """Every file and key spelling: a prompt's rows with the base's weights, slots with uniforms behind them."""
    write, _, kind, alpha = ptp.CASES[name]
    write(tmp_path)
    source = next(path for path in tmp_path.iterdir() if path.is_file())
    base = save_tiny(tmp_path / "base", "llama", seed=3)
    model, _ = mtp_mlx.load(str(base), ptp.converted(source, base, tmp_path / "out"))
    tokens, uniforms = [3, 14, 15, 92, 65], np.array([0.0, 0.171, 0.53, 0.77, 0.9999], dtype=np.float32)
    cache = model.make_cache()
    mx.eval(model.forward(Block.real(mx.array([tokens[:-1]])), cache))
    block = Block.decode(mx.array(tokens[-1:]), block_shape(0, (4,), lead=1), 4, model.vocab_size)
    found = np.array(model.head(model.forward(replace(block, uniforms=mx.array(uniforms)), cache))[0])

    reference = by_torch(base, "llama")
    modules = dict(reference.model.named_modules())
    for path in {key.rsplit(".", 1)[0] for key in ptp.LOW_RANK}:
        a, b = ptp.LOW_RANK[f"{path}.A"], ptp.LOW_RANK[f"{path}.B"]
        modules[path].register_forward_hook(low_rank_behind(len(tokens), alpha / ptp.RANK, a, b))
    slots = embed_uniform(ptp.KNOTS if kind == "interpolation" else ptp.LINEAR, kind, uniforms)
    with torch.no_grad():
        real = reference.model.embed_tokens(torch.tensor([tokens]))
        rows = torch.cat([real, torch.tensor(slots[None].astype(np.float32))], dim=1)
        count = rows.shape[1]
        hidden = torch.triu(torch.full((count, count), torch.finfo(torch.float32).min), diagonal=1)
        positions = torch.tensor([[*range(len(tokens)), *range(len(tokens) - 1, count - 1)]])
        expected = reference(
            inputs_embeds=rows, attention_mask=hidden[None, None], position_ids=positions, use_cache=False
        ).logits[0, len(tokens) - 1 :]
    assert np.abs(found).max() > 1
    assert np.abs(found - expected.numpy()).max() < 1e-4 * max(1.0, np.abs(found).max())
