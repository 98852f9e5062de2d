"""Proves that Medusa's and Meta's heads, converted and run, draft what an independent numpy forward drafts.

Medusa's file holds heads alone and is read with the restricted unpickler; Meta's checkpoint has its own names and its
own order of rows in q and k, which the oracle uses as they are (rotary embedding of neighbours).
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
from mtp_mlx.decode.loop import mtp_generate_step, speculative_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import ChainPolicy
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.block import Block
from mtp_mlx.planning.choose import build_policy
from tests.convert.heads.head_checkpoints import Made
from tests.convert.heads.head_configs import BASE, D, L, V
from tests.convert.heads.numpy_layers import Array, GroupedQueries, Layer, Tensors, silu
from tests.convert.heads.parity_checkpoints import drawn
from tests.convert.heads.parity_families import LLAMA
from tests.convert.heads.parity_setup import TOKENS, TOLERANCE, convert, convert_heads, write_pytorch
from tests.convert.read.torch_files import write_torch
from tests.convert.whole_checkpoints import with_tokenizer
from tests.tiny import tiny_model

CONFIG = BASE | {"model_type": "llama"}
COUNT = 3

# Meta's name within a layer -> Hugging Face's.
META_NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
META_LAYER = {
    "attention.wq": (D, D),
    "attention.wk": (24, D),
    "attention.wv": (24, D),
    "attention.wo": (D, D),
    "feed_forward.w1": (128, D),
    "feed_forward.w2": (D, 128),
    "feed_forward.w3": (128, D),
    "attention_norm": (D,),
    "ffn_norm": (D,),
}
PARAMS = {
    "dim": D,
    "n_layers": 6,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 8,
    "vocab_size": V,
    "n_future_tokens": 4,
    "norm_eps": 1e-6,
}


def llama_tensors(layers: int, width: int, head_dim: int) -> dict[str, Array]:
    """A llama's tensors under Hugging Face's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {f"{p}{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q", 4), ("k", 2), ("v", 2)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows * head_dim, D)
        shapes[f"{p}self_attn.o_proj.weight"] = (D, 4 * head_dim)
        shapes |= {f"{p}mlp.{name}_proj.weight": (width, D) for name in ("gate", "up")}
        shapes[f"{p}mlp.down_proj.weight"] = (D, width)
    return {name: drawn(name, shape) for name, shape in shapes.items()}


@dataclass
class Oracle:
    """The trunk and its heads in numpy; `wrong` is a mistake to make.

    trunk: tensors whose layers `layer` runs. heads: the family's own tensors.
    """

    kind: str
    trunk: dict[str, Array]
    layers: int
    layer: Layer
    heads: dict[str, Array]
    wrong: str = ""

    def logits(self, tokens: list[int]) -> list[Array]:
        """[T, V] of the trunk and of every head."""
        t = Tensors(self.trunk)
        x = t["model.embed_tokens.weight"][tokens]
        states = [x]
        for i in range(self.layers):
            states.append(self.layer(t.below(f"model.layers.{i}."), states[-1]))
        unembed = t["lm_head.weight"].T
        last = t.norm("model.norm", states[-1])
        heads = (
            [self._medusa(i, last if self.wrong != "state" else states[-1]) for i in range(COUNT)]
            if self.kind == "medusa"
            else [self._meta(i, states) @ unembed for i in range(COUNT)]
        )
        return [last @ unembed, *heads]

    def _medusa(self, i: int, x: Array) -> Array:
        t = Tensors(self.heads)
        for j in range(2):
            made = silu(t.linear(f"{i}.{j}.linear", x))
            x = made if self.wrong == "no residual" else x + made
        return x @ t[f"{i}.2.weight"].T

    def _meta(self, i: int, states: list[Array]) -> Array:
        layer = self.layer
        if self.wrong == "halves":
            layer = replace(layer, attention=replace(layer.attention, neighbours=False))
        x = states[-1] if self.wrong == "state" else states[-2]
        y = layer(Tensors(self.heads).below(f"extra_heads.{i}."), x)
        return y if self.wrong == "no norm" else Tensors(self.trunk).norm("model.norm", y)

    def drafts(self, tokens: list[int]) -> list[int]:
        """Drafts behind `tokens`, the last of which is the target's own pick."""
        return [int(logits[-1].argmax()) for logits in self.logits(tokens[:-1])[1:]]

    def next_token(self, tokens: list[int]) -> int:
        """The trunk's pick."""
        return int(self.logits(tokens)[0][-1].argmax())


@pytest.fixture(scope="module", params=["medusa", "meta"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AttachedModel, Oracle]:
    """A model with converted heads attached, and its oracle."""
    make = medusa if request.param == "medusa" else meta
    out, heads_folder, oracle = make(tmp_path_factory.mktemp(request.param))
    model, _ = load_model(out)
    heads, info = load_folder(heads_folder, model)
    assert len(heads.heads) == heads.drafts == heads.most_drafts == COUNT
    heads.set_dtype(mx.float32)
    attached = attach(model, heads)
    attached.info, attached.name = info, str(heads_folder)
    return attached, oracle


def medusa(folder: Path) -> tuple[Path, Path, Oracle]:
    """medusa_lm_head.pt of three heads with two residual layers, converted for the llama that it is for."""
    trunk = llama_tensors(L, 56, 16)
    heads: dict[str, Array] = {}
    for i in range(COUNT):
        for j in range(2):
            heads[f"{i}.{j}.linear.weight"] = drawn(f"{i}.{j}.w", (D, D))
            heads[f"{i}.{j}.linear.bias"] = drawn(f"{i}.{j}.bias", (D,))
        heads[f"{i}.2.weight"] = drawn(f"{i}.2.weight", (V, D))
    base = convert(write_pytorch(Made(trunk, CONFIG, {}), folder / "trunk"), folder / "out")
    source = folder / "heads-source"
    source.mkdir()
    write_torch(source / "medusa_lm_head.pt", heads)
    (source / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    converted = convert_heads(source, folder / "heads", "--base", str(base))
    return base, converted, Oracle("medusa", trunk, L, LLAMA, heads)


def meta(folder: Path) -> tuple[Path, Path, Oracle]:
    """consolidated.pth with three trunk layers and three extra heads, converted whole."""
    blocks = [f"layers.{i}" for i in range(3)] + [f"extra_heads.{i}" for i in range(COUNT)]
    stored = {
        f"{b}.{name}.weight": drawn(f"{b}.{name}.weight", shape)
        for b in blocks
        for name, shape in META_LAYER.items()
    }
    stored |= {"tok_embeddings.weight": drawn("embed", (V, D)), "norm.weight": drawn("norm", (D,))}
    stored["output.weight"] = drawn("output.weight", (V, D))
    source = with_tokenizer(folder / "model")
    write_torch(source / "consolidated.pth", stored)
    (source / "params.json").write_text(json.dumps(PARAMS))
    renamed = dict(stored)
    for old, new in META_NAMES.items():
        renamed = {key.replace(f".{old}.", f".{new}."): value for key, value in renamed.items()}
    whole = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    whole["output.weight"] = "lm_head.weight"
    heads = {key: value for key, value in renamed.items() if key.startswith("extra_heads")}
    trunk = {whole.get(key, f"model.{key}"): value for key, value in renamed.items() if key not in heads}
    layer = Layer(GroupedQueries(4, 2, 12, 12, neighbours=True))
    out = convert(source, folder / "out")
    return out, out / "mtp", Oracle("meta", trunk, 3, layer, heads)


def head_logits(attached: AttachedModel, tokens: list[int]) -> list[Array]:
    """[T, V] of the trunk and of every head, as mtp-mlx computes them over a whole text."""
    heads: Any = attached.speculator
    hidden = attached.forward(Block.real(mx.array([tokens])), attached.make_cache())
    found = [attached.head(hidden)]
    for depth, head in enumerate(heads.heads, start=1):
        made = head(attached.head_input)
        unembed = heads.unembedding(depth)
        found.append(attached.head(attached.last_norm(made)) if unembed is None else unembed(made))
    return [np.array(logits[0]) for logits in found]


def test_logits(case: tuple[AttachedModel, Oracle]) -> None:
    attached, oracle = case
    for found, expected in zip(head_logits(attached, TOKENS), oracle.logits(TOKENS), strict=True):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("wrong", ["state", "no residual", "halves", "no norm"])
def test_a_wrong_convention_fails(case: tuple[AttachedModel, Oracle], wrong: str) -> None:
    attached, oracle = case
    counts = ("state", "no residual") if oracle.kind == "medusa" else ("state", "halves", "no norm")
    found, mistaken = head_logits(attached, TOKENS), replace(oracle, wrong=wrong).logits(TOKENS)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(found[1:], mistaken[1:], strict=True))
    assert (difference > 100 * TOLERANCE) == (wrong in counts)


def test_drafts_of_steps(case: tuple[AttachedModel, Oracle]) -> None:
    """Behind a prompt read in chunks, behind blocks with accepted and rejected drafts, and after shorter steps."""
    attached, oracle = case
    settings = CacheSettings(prefill_step_size=4)
    opened = partial(attached.speculator.open, attached, Picker(), COUNT)  # type: ignore[union-attr]
    session = Session(attached, Picker(), TOKENS[:9], attached.make_cache(), settings, opened)
    session.prefill()
    fresh = speculative_step(session, Layout.chained(0, COUNT), []).fresh
    assert list(fresh.tokens) == oracle.drafts(session.tokens)
    for accepted, count in ((2, 3), (0, 1), (1, 2), (3, 3), (1, 0), (0, 3)):
        drafts: list[int] = []
        for _ in range(3):
            drafts.append(oracle.next_token([*session.tokens, *drafts]))
        if accepted < 3:
            drafts[accepted] = (drafts[accepted] + 1) % V
        result = speculative_step(session, Layout.chained(3, count), drafts)
        assert result.n_accepted == accepted
        assert list(result.fresh.tokens) == oracle.drafts(session.tokens)[:count]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_text_is_that_of_plain_decoding(case: tuple[AttachedModel, Oracle], temperature: float) -> None:
    attached, _ = case
    sampling, stats = SamplingConfig(temperature=temperature, seed=3), DecodeStats()
    plain = mtp_generate_step(TOKENS[:5], attached, max_tokens=20, sampling=sampling)
    expected = [item.token for item in plain]
    steps = mtp_generate_step(
        TOKENS[:5], attached, max_tokens=20, sampling=sampling, policy=ChainPolicy(COUNT), stats=stats
    )
    assert [item.token for item in steps] == expected
    assert stats.layouts["3/3 heads"] > 3


def test_more_drafts_than_heads_are_refused(case: tuple[AttachedModel, Oracle]) -> None:
    attached, _ = case
    assert build_policy(attached, "linear", None, DecodeStats()).own_drafts == COUNT
    with pytest.raises(MTPError, match="must be 1 to 3; got 4"):
        build_policy(attached, "linear", 4, DecodeStats())
    with pytest.raises(MTPError, match="must be 1 to 3; got 4"):
        list(mtp_generate_step(TOKENS, attached, max_tokens=4, policy=ChainPolicy(4)))


def test_the_converted_folder_is_loaded_and_decoded(case: tuple[AttachedModel, Oracle]) -> None:
    """As a user does it, and compared with mlx-lm's own text."""
    attached, _ = case
    heads_folder = Path(attached.name)
    base = heads_folder.parent if heads_folder.name == "mtp" else heads_folder.parent / "out"
    model, tokenizer = load(str(base), "auto" if heads_folder.name == "mtp" else heads_folder)
    assert model.most_drafts == COUNT and model.info.base_fingerprint is not None
    found = [
        item.token for item in stream_generate(model, tokenizer, TOKENS[:9], layout="linear", max_tokens=10)
    ]
    theirs = generate_step(mx.array(TOKENS[:9]), load_model(base)[0], max_tokens=10)
    assert found == [int(token) for token, _ in theirs][: len(found)] and len(found) > 1


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Heads for another vocabulary, more drafts than heads, and a convention that Medusa's heads cannot have."""
    base, out, _ = medusa(tmp_path)
    model, _ = load_model(base)
    path = out / "mtp_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"base": {"name": "another", "fingerprint": None}}))
    with pytest.raises(
        MTPError, match=r"heads\.0\.lm_head\.weight is \(40, 48\) in the file, \(157, 48\) expected"
    ):
        load_folder(out, tiny_model("llama", seed=3))
    path.write_text(json.dumps(raw | {"heads": raw["heads"] | {"drafts": 4}}))
    with pytest.raises(MTPError, match=r"3 head\(s\) of the kind 'medusa' cannot draft 4 tokens per step"):
        load_folder(out, model)
    convention = raw["heads"]["convention"] | {"first_hidden": "before-last-layer"}
    path.write_text(json.dumps(raw | {"heads": raw["heads"] | {"convention": convention}}))
    with pytest.raises(MTPError, match="are not supported yet: their first hidden is 'before-last-layer'"):
        load_folder(out, model)
