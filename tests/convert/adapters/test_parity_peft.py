"""Proves that a PEFT LoRA folder, converted and run, drafts what an independent numpy forward drafts.

Base and adapter are PyTorch files, converted from the command line. The oracle runs text rows through the base's
weights and slot rows through the merged ones, in float64 (arXiv 2507.11851: the low-rank update is gated).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from mtp_mlx import load, stream_generate
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import speculative_step
from mtp_mlx.decode.pick import Picker
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.block import Block
from tests.convert.heads.head_checkpoints import Made
from tests.convert.heads.head_configs import BASE, D, L
from tests.convert.heads.numpy_layers import Array, Tensors, silu
from tests.convert.heads.parity_checkpoints import drawn
from tests.convert.heads.parity_families import LLAMA
from tests.convert.heads.parity_setup import TOKENS, TOLERANCE, convert, convert_heads, write_pytorch
from tests.convert.heads.test_parity_independent import llama_tensors
from tests.convert.read.torch_files import write_torch

CONFIG = BASE | {"model_type": "llama"}
RANK, ALPHA, SLOTS, WIDTH = 4, 8, 3, 20
SIZES = {"q_proj": (48, 64), "v_proj": (48, 32), "o_proj": (64, 48)}
TEXT = TOKENS[:7]


def adapter_tensors() -> dict[str, Array]:
    """LoRA factors of attention in every layer, slot embeddings and a sampler head, under PEFT's names."""
    found = {}
    for layer in range(L):
        for name, (width, height) in SIZES.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
            found[f"{stem}A.weight"] = 2 * drawn(f"{stem}A", (RANK, width))
            found[f"{stem}B.weight"] = drawn(f"{stem}B", (height, RANK))
    shapes = {
        "slot_embeddings.weight": (SLOTS, D),
        "sampler.first.weight": (WIDTH, 2 * D),
        "sampler.first.bias": (WIDTH,),
        "sampler.norm.weight": (WIDTH,),
        "sampler.norm.bias": (WIDTH,),
        "sampler.second.weight": (D, WIDTH),
    }
    return found | {f"base_model.model.{name}": drawn(name, shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class GatedTensors(Tensors):
    """Tensors whose linear layers have a low-rank update on the rows from `first` on."""

    first: int = 0
    scale: float = 0.0
    factors: Any = None

    def below(self, prefix: str) -> GatedTensors:
        return replace(self, prefix=self.prefix + prefix)

    def linear(self, name: str, x: Array) -> Array:
        y, stem = super().linear(name, x), f"base_model.model.{self.prefix}{name}.lora_"
        if f"{stem}A.weight" not in self.factors:
            return y
        down, up = (self.factors[f"{stem}{part}.weight"].astype(np.float64) for part in "AB")
        update = self.scale * (x @ down.T) @ up.T
        return y + np.where(np.arange(len(x))[:, None] >= self.first, update, 0)


@dataclass
class Oracle:
    """The base and the adapter in numpy; `wrong` is a mistake to make."""

    base: dict[str, Array]
    adapter: dict[str, Array]
    wrong: str = ""

    def states(self, text: list[int], slots: int) -> Array:
        """[T + slots, D] after the last norm, of a text and the slots behind it."""
        scale = ALPHA / (RANK**0.5 if self.wrong == "scale" else RANK)
        first = {"gate": 0, "no update": len(text) + slots}.get(self.wrong, len(text))
        t = GatedTensors(self.base, first=first, scale=scale, factors=self.adapter)
        rows = self.adapter["base_model.model.slot_embeddings.weight"][:slots].astype(np.float64)
        x = np.concatenate([t["model.embed_tokens.weight"][text], rows])
        for i in range(L):
            x = LLAMA(t.below(f"model.layers.{i}."), x)
        return t.norm("model.norm", x)

    def logits(self, states: Array) -> Array:
        return states @ self.base["lm_head.weight"].astype(np.float64).T

    def drafts(self, text: list[int], slots: int) -> list[int]:
        """The target's pick behind `text`, then the drafts behind it, each through the sampler head."""
        states = self.states(text, slots)
        tokens = [int(self.logits(states)[len(text) - 1].argmax())]
        t = Tensors(self.adapter, "base_model.model.sampler.")
        for z in states[len(text) :]:
            previous = self.base["model.embed_tokens.weight"][tokens[-1]].astype(np.float64)
            x = np.concatenate([v / np.sqrt((v**2).mean() + 1e-6) for v in (previous, z)])
            x = silu(t.linear("first", x))
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * t["norm.weight"] + t["norm.bias"]
            tokens.append(int(self.logits(z + t.linear("second", x)).argmax()))
        return tokens


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Oracle]:
    """Folders of the converted base and adapter, and the oracle."""
    folder = tmp_path_factory.mktemp("peft")
    trunk, adapter = llama_tensors(L, 56, 16), adapter_tensors()
    base = convert(write_pytorch(Made(trunk, CONFIG, {}), folder / "trunk"), folder / "base")
    source = folder / "lora"
    source.mkdir()
    write_torch(source / "adapter_model.bin", adapter)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (source / "adapter_config.json").write_text(json.dumps(settings))
    out = convert_heads(source, folder / "adapter", "--base", str(base))
    # The folder keeps bfloat16: so does the oracle, or the comparison would be one of roundings.
    rounded = {
        name: np.array(mx.array(value).astype(mx.bfloat16).astype(mx.float32))
        for name, value in adapter.items()
    }
    return base, out, Oracle(trunk, rounded)


def attached(base: Path, out: Path) -> AttachedModel:
    """The model with its adapter, all in float32."""
    model, _ = load_model(base)
    adapter, info = load_folder(out, model)
    adapter.load_tensors({name: value.astype(mx.float32) for name, value in adapter.tensors().items()})
    made = attach(model, adapter)
    made.info = info
    return made


def logits(model: AttachedModel) -> Array:
    """[T + k, V] of TEXT and the slots behind it, as mtp-mlx computes them."""
    rows = len(TEXT) + SLOTS
    ids = mx.array([[*TEXT, *range(model.vocab_size, model.vocab_size + SLOTS)]])
    sees = mx.tril(mx.ones((rows, rows), dtype=mx.bool_))
    block = Block(ids, n_real=len(TEXT), positions=mx.arange(rows), visibility=sees)
    return np.array(model.head(model.forward(block, model.make_cache()))[0])


def test_logits(case: tuple[Path, Path, Oracle]) -> None:
    base, out, oracle = case
    expected = oracle.logits(oracle.states(TEXT, SLOTS))
    np.testing.assert_allclose(logits(attached(base, out)), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("wrong", ["scale", "gate", "no update"])
def test_a_wrong_convention_fails(case: tuple[Path, Path, Oracle], wrong: str) -> None:
    base, out, oracle = case
    mistaken = replace(oracle, wrong=wrong)
    difference = np.abs(logits(attached(base, out)) - mistaken.logits(mistaken.states(TEXT, SLOTS)))
    assert difference[len(TEXT) :].max() > 100 * TOLERANCE
    assert (difference[: len(TEXT)].max() > 100 * TOLERANCE) == (wrong == "gate")


def test_drafts_of_a_step(case: tuple[Path, Path, Oracle]) -> None:
    """The target's pick, and what the slots behind it draft through the sampler head, one after another."""
    base, out, oracle = case
    model = attached(base, out)
    for length in range(2, 8):
        text = TOKENS[3 : 3 + length]
        opened = partial(model.speculator.open, model, Picker(), SLOTS)  # type: ignore[union-attr]
        session = Session(model, Picker(), text, model.make_cache(), CacheSettings(), opened)
        session.prefill()
        found = speculative_step(session, Layout.linear(0, SLOTS), [])
        assert [*found.tokens, *found.fresh.tokens] == oracle.drafts(text, SLOTS)


@pytest.mark.parametrize("layout", ["linear", "quadratic"])
def test_the_converted_folder_is_loaded_and_decoded(case: tuple[Path, Path, Oracle], layout: Any) -> None:
    base, out, _ = case
    model, tokenizer = load(str(base), out)
    assert model.most_drafts == SLOTS
    found = [item.token for item in stream_generate(model, tokenizer, TEXT, layout=layout, max_tokens=10)]
    theirs = generate_step(mx.array(TEXT), load_model(base)[0], max_tokens=10)
    assert found == [int(token) for token, _ in theirs][: len(found)] and len(found) > 1
