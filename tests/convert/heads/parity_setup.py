"""A family's tiny checkpoint, converted and loaded as a user would, beside what the numpy oracle says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from click.testing import CliRunner
from mlx_lm.utils import load_model

import mtp_mlx.cli as cli
from mtp_mlx.adapter_folder import Header
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import mtp_generate_step, speculative_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import ChainPolicy
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.model.attach import attach
from mtp_mlx.model.block import Block
from mtp_mlx.model.seams import find_seams
from tests.convert.heads.head_cases import CASES
from tests.convert.heads.head_checkpoints import Made
from tests.convert.heads.head_configs import V
from tests.convert.heads.numpy_heads import Rules, greedy_chain, head_logits
from tests.convert.heads.numpy_layers import Array, Tensors
from tests.convert.heads.parity_checkpoints import parity_checkpoint, trunk_arrays, trunk_config
from tests.convert.heads.parity_families import FAMILIES, Family
from tests.convert.read.torch_files import write_torch
from tests.convert.whole_checkpoints import with_tokenizer

TOLERANCE = 1e-4
TOKENS = np.random.default_rng(7).integers(0, V, 20).tolist()


def convert(source: Path, out: Path, *options: str) -> Path:
    """`mtp-mlx convert SOURCE OUT`."""
    result = CliRunner().invoke(cli.main, ["convert", str(source), str(out), *options])
    assert result.exit_code == 0, result.output
    return out


def convert_heads(source: Path, out: Path, *options: str) -> Path:
    """`mtp-mlx convert SOURCE OUT --heads-only`."""
    return convert(source, out, "--heads-only", *options)


def write_pytorch(made: Made, folder: Path) -> Path:
    """A checkpoint as a PyTorch file, with its configuration and a tokenizer."""
    with_tokenizer(folder)
    write_torch(folder / "pytorch_model.bin", made.stored)
    (folder / "config.json").write_text(json.dumps(made.config))
    return folder


@dataclass
class Parity:
    """One family, converted.

    Attributes:
        made: the checkpoint. folder, heads_folder: what it was converted to.
        model: the trunk as mlx-lm loads it. heads, info: as mtp-mlx loads them.
    """

    family: Family
    made: Made
    folder: Path
    heads_folder: Path
    model: Any
    heads: MTPHeads
    info: Header

    @staticmethod
    def of(name: str, folder: Path, **convention: Any) -> Parity:
        """Writes, converts and loads; `convention` is what to change in the converted folder's.

        The checkpoint is a PyTorch file, converted whole; speculators keep heads alone, so they are converted for a
        base that was converted before them.
        """
        family = FAMILIES[name]
        made = parity_checkpoint(family.case, family.settings)
        out, heads_folder = folder / "out", folder / "out" / "mtp"
        if "transformer_layer_config" in made.config:
            names = trunk_arrays(CASES[family.case], trunk_config(made)).keys()
            trunk = Made({key: made.stored[key] for key in names}, trunk_config(made), {})
            convert(write_pytorch(trunk, folder / "trunk"), out)
            alone = {key: value for key, value in made.stored.items() if key not in names}
            source = write_pytorch(replace(made, stored=alone), folder / "heads-source")
            heads_folder = convert_heads(source, folder / "heads", "--base", str(out))
        else:
            convert(write_pytorch(made, folder / "model"), out)
        config = json.loads((heads_folder / "mtp_config.json").read_text())
        config["heads"]["convention"] |= convention
        (heads_folder / "mtp_config.json").write_text(json.dumps(config))
        model, _ = load_model(out)
        heads, info = load_folder(heads_folder, model)
        heads.set_dtype(mx.float32)
        return Parity(family, made, out, heads_folder, model, heads, info)

    @property
    def trunk(self) -> Any:
        """The module that maps ids to hidden states."""
        return find_seams(self.model).trunk

    def states(self, tokens: list[int]) -> dict[str, Array]:
        """States of the trunk by the oracle, [T, D] each."""
        t = Tensors(self.made.stored, plus=self.family.rules.plus)
        root = self.family.root
        x = t[f"{root}{self.family.embed}.weight"][tokens]
        before = x
        for index, layer in enumerate(self.family.trunk):
            before, x = x, layer(t.below(f"{root}layers.{index}."), x)
        last = t.norm(root + self.family.norm, x)
        return {"before-last-layer": before, "pre-norm": x, "post-norm": last}

    def states_by_mlx(self, tokens: list[int]) -> dict[str, Array]:
        """The last state of mlx-lm's trunk."""
        return {"post-norm": np.array(self.trunk(mx.array([tokens]))[0], dtype=np.float64)}

    @cached_property
    def known(self) -> dict[str, Array]:
        """States of TOKENS, over which heads are compared."""
        given = self.states_by_mlx(TOKENS) if self.family.given else {}
        return self.states(TOKENS) | given

    def expected(self, rules: Rules | None = None) -> list[Array]:
        """The oracle's logits of heads over TOKENS."""
        family = self.family
        stored, found = self.made.stored, rules or family.rules
        return head_logits(stored, family.names, family.heads, found, TOKENS, self.known, family.depths)

    def expected_drafts(self, tokens: list[int], count: int) -> list[int]:
        """The oracle's drafts behind `tokens`, the last of which is the target's own pick."""
        family, states = self.family, self.states(tokens[:-1])
        return greedy_chain(self.made.stored, family.names, family.heads, family.rules, tokens, states, count)

    def next_token(self, tokens: list[int]) -> int:
        """The trunk's own pick behind `tokens`, by the oracle."""
        last = self.states(tokens)["post-norm"][-1]
        return int((last @ self.made.stored["lm_head.weight"].T.astype(np.float64)).argmax())

    @cached_property
    def logits(self) -> list[Array]:
        """Logits of the loaded heads over TOKENS, [T - k, V] for each depth."""
        ids = mx.array([TOKENS])
        attached = attach(self.model, self.heads)
        attached.forward(Block.real(ids), attached.make_cache())
        attached.detach()
        found = self.heads.cascade(self.embed(ids), attached.head_input, self.family.depths)
        return [np.array(self.unembed(z, depth)[0]) for depth, z in enumerate(found, start=1)]

    def embed(self, ids: mx.array) -> mx.array:
        """The embedding that heads take."""
        return self.heads.heads[0].embed(ids, find_seams(self.model).embedding)

    def unembed(self, z: mx.array, depth: int) -> mx.array:
        """Logits of what a head made."""
        owner = getattr(self.model, "language_model", self.model)
        return self.heads.at_depth(depth).get("lm_head", owner.lm_head)(z)


def worst(found: list[Array], expected: list[Array]) -> float:
    """Largest difference between logits of all depths."""
    assert len(found) == len(expected)
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def drafts_of_two_steps(parity: Parity) -> tuple[list[list[int]], list[list[int]]]:
    """Drafts of the decode loop, and the oracle's: behind a prompt, and behind a block of three drafts of which the
    first two are accepted."""
    count = parity.family.depths
    attached = attach(parity.model, parity.heads)
    try:
        cache = attached.make_cache()
        session = Session(
            attached,
            Picker(),
            TOKENS[:9],
            cache,
            CacheSettings(),
            partial(parity.heads.open, attached, Picker(), count),
        )
        session.prefill()
        found = [list(speculative_step(session, Layout.chained(0, count), []).fresh.tokens)]
        expected = [parity.expected_drafts(session.tokens, count)]
        right: list[int] = []
        for _ in range(3):
            right.append(parity.next_token([*session.tokens, *right]))
        second = speculative_step(session, Layout.chained(3, count), [*right[:2], (right[2] + 1) % V])
        assert second.n_accepted == 2 and second.tokens == right
        return [*found, list(second.fresh.tokens)], [*expected, parity.expected_drafts(session.tokens, count)]
    finally:
        attached.detach()


def same_text(parity: Parity, sampling: SamplingConfig | None = None) -> None:
    """The text with heads is that of plain decoding."""
    depths, stats = parity.family.depths, DecodeStats()
    attached = attach(parity.model, parity.heads)
    try:
        plain = mtp_generate_step(TOKENS[:9], attached, max_tokens=16, sampling=sampling)
        expected = [item.token for item in plain]
        policy = ChainPolicy(depths)
        steps = mtp_generate_step(
            TOKENS[:9], attached, max_tokens=16, sampling=sampling, policy=policy, stats=stats
        )
        assert [item.token for item in steps] == expected
        assert stats.layouts[f"{depths}/{depths} heads"] > 3
    finally:
        attached.detach()
