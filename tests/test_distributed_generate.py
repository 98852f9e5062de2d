"""Proves that processes which share a model by its own `shard` write the text of one process, and say it once."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mtp_mlx.api import _same_texts, load
from mtp_mlx.cli import main
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.led import LedPolicy, led, led_policy
from mtp_mlx.decode.policy import FixedPolicy, Proposal
from mtp_mlx.distributed import Peers
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.folder import LAST_LAYER, HeadsConfig, heads_header
from mtp_mlx.drafters.heads.folder import save as save_heads
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.drafters.memory.memory_file import MemoryFile
from mtp_mlx.drafters.memory.source import Memory
from mtp_mlx.drafters.memory.vocabulary import vocabulary_fingerprint
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.fingerprint import base_fingerprint, sample_base
from mtp_mlx.model.sharded import shard
from tests.decode.fakes import PlainWatching, random_adapter
from tests.drafters.heads.test_mtp_head import random_heads
from tests.drafters.memory.tables import memory_of
from tests.launched import Launched
from tests.sharded_script import answers
from tests.tiny import VOCABULARY, save_tiny, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, an adapter and heads for it."""
    root = tmp_path_factory.mktemp("sharded")
    save_tiny(root / "llama", "llama", seed=3)
    base = tiny_model("llama", seed=3)
    adapter = random_adapter(base)
    sample = sample_base(base)
    info = mask_header(adapter.config, "tiny", base_fingerprint(base), base_sample=sample)
    save_adapter(root / "slots", adapter, info)
    convention = HeadConvention("test")
    heads = MTPHeads(random_heads(base, 3, convention).heads, convention)
    info = heads_header(HeadsConfig(convention, [dict(LAST_LAYER)] * 3), "tiny", base_fingerprint(base))
    save_heads(root / "heads", heads, info)
    known = np.random.default_rng(0).integers(0, VOCABULARY, 3000).tolist()
    memory_of(root / "a.mem", [(known, 0)], vocabulary_fingerprint(load(str(root / "llama"), None)[1]))
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))


def requests(folder: Path) -> list[dict[str, Any]]:
    slots, heads = str(folder / "slots"), str(folder / "heads")
    sampled = {"temperature": 3.0, "seed": 4}
    return [
        {"adapter": None, "layout": "plain"},
        {"adapter": None, "layout": "linear", "drafter": "lookup"},
        {"adapter": slots, "layout": "quadratic", "slots": 3},
        {"adapter": slots, "layout": "quadratic", "slots": 2, "sampling": sampled, "lookup": True},
        {"adapter": slots, "emit": "static", "slots": 2},  # the drafts themselves, so LoRA is in the text
        {"adapter": heads, "layout": "linear", "sampling": sampled},
        {"adapter": None, "layout": "tree", "memory": str(folder / "a.mem"), "sampling": sampled},
        {"adapter": slots, "layout": "auto"},
    ]


def test_whole_layers_of_a_lazy_model_do_not_stay_in_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 2048}
    save_tiny(tmp_path / "llama", "llama", seed=3, **sizes)
    adapter = random_adapter(tiny_model("llama", seed=3, **sizes))
    model = load_model(tmp_path / "llama", lazy=True)[0]

    def halve(group: Any) -> None:
        for layer in model.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                own = nn.Linear(1, 1, bias=False)
                own.weight = mx.contiguous(mx.split(layer.mlp[name].weight, 2, axis=0)[0])
                layer.mlp[name] = own

    model.shard = halve
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    shard(model, adapter, Peers())
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    largest = 4 * 256 * 2048
    assert mx.get_peak_memory() - before < size + 1.5 * largest
    assert mx.get_active_memory() - before < size + 0.2 * largest


def test_a_shared_model_writes_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "requests.json"
    given.write_text(json.dumps(requests(folder)))
    model = str(folder / "llama")
    stdout, stderr = Launched(2, ["tests.sharded_script", model, str(given)], tmp_path).finish()
    found = sorted((json.loads(line) for line in stdout.splitlines()), key=lambda one: one["rank"])
    assert [one["rank"] for one in found] == [0, 1], stderr
    alone = answers(model, requests(folder), Peers())
    for one in found:
        assert one["tokens"] == alone["tokens"]
        assert one["bytes"] < 0.6 * alone["bytes"]
    assert found[0]["accepted"] == found[1]["accepted"]
    assert found[0]["accepted"][:7] == alone["accepted"][:7]  # drafts too; auto plans by measured time
    assert alone["accepted"][4] > 0 and len(set(alone["tokens"][4])) > 4
    assert alone["tokens"][3] != alone["tokens"][2] != alone["tokens"][4]


def test_the_command_prints_once(folder: Path, tmp_path: Path) -> None:
    words = [
        "generate",
        "-m",
        str(folder / "llama"),
        "-a",
        str(folder / "slots"),
        "-p",
        "The sky",
        "-n",
        "8",
    ]
    words += ["--layout", "quadratic"]
    stdout, stderr = Launched(2, ["cli", *words, "--json"], tmp_path).finish()
    result = CliRunner().invoke(main, [*words, "--json"])
    assert json.loads(stdout)["tokens"] == json.loads(result.stdout)["tokens"], stderr
    assert stderr.count(" tok/s ") == 1


def test_a_number_that_does_not_divide_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    words = ["generate", "-m", str(folder / "llama"), "-a", "none", "-p", "a"]
    stdout, stderr = Launched(3, ["cli", *words], tmp_path).finish()
    assert stdout == "" and "model type 'llama' cannot be divided among 3 processes (" in stderr


def test_stdin_and_exact_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_WORLD_SIZE", "2")
    for words in ([], ["-p", "-"]):
        result = CliRunner().invoke(main, ["generate", "-m", str(folder / "llama"), *words])
        assert result.exit_code == 2 and "stdin under mlx.launch: give --prompt TEXT" in result.stderr
    from mtp_mlx import load

    with pytest.raises(MTPError, match="exact decoding needs a single process"):
        load(str(folder / "llama"), None, exact=True, peers=Peers(size=2))


def test_models_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(MTPError, match="model type 'gemma2' has no `shard` in mlx-lm"):
        shard(tiny_model("gemma2", seed=3), None, Peers(size=2))
    with pytest.raises(MTPError, match="has recurrent state"):
        shard(tiny_model("qwen3_5", seed=3), None, Peers(size=2))


class Told(Peers):
    """Process 1 of two, told what the first said."""

    def gather(self, value: Any) -> list[Any]:
        assert not value
        return json.loads(json.dumps([self.__dict__["said"], value]))


def test_the_first_process_decides() -> None:
    proposals = [Proposal.chain("slots", [1, 2, 3], [0.5] * 3), Proposal.chain("lookup", [7, 8], [1.0, 1.0])]
    follower = Told(rank=1, size=2)
    follower.__dict__["said"] = ["lookup", [7], [-1], [1.0], [], 1, [2, 3], 0, [], 1]
    policy = LedPolicy(FixedPolicy("plain", 0), follower)
    assert policy.choose(proposals) == (Proposal.chain("lookup", [7], [1.0]), Layout(1, (2, 3)))
    follower.__dict__["said"] = True
    assert policy.interrupts_plain() is True
    for peers, told in ((follower, []), (Told(rank=0, size=2), [7])):
        watching = PlainWatching()
        LedPolicy(watching, peers).begin(7)
        assert watching.contexts == told
    own = FixedPolicy("quadratic", 2)
    assert led_policy(own, Peers()) is own and led_policy(own, follower) is not own
    values = mx.array([1, 2])
    assert led(Peers(), values) is values


def test_different_memories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their drafts would differ, and so would the rows of the processes' passes."""
    files = [memory_of(tmp_path / f"{n}.mem", [([1, 2, n], 0)]) for n in (3, 4)]
    model = attach(tiny_model("llama", seed=3))
    model.peers = Peers(rank=0, size=2)
    texts = [Memory(file, VOCABULARY) for file in files]
    others: list[Any] = [texts[1]]

    def gather(_: Peers, value: Any) -> list[Any]:
        theirs = None if others[0] is None else others[0].fingerprint()
        return [value, {"what `memory` holds": theirs}]

    monkeypatch.setattr(Peers, "gather", gather)
    for own, other in ((texts[0], texts[1]), (None, texts[1]), (texts[0], None)):
        model.text_source, others[0] = own, other
        with pytest.raises(MTPError, match="give all of them the same file"):
            _same_texts(model)
    model.text_source, others[0] = texts[0], Memory(MemoryFile(files[0].path), VOCABULARY)
    _same_texts(model)
