"""Proves that a known text is written in the steps of real decoding, whatever drafts, and the table is theirs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tree_acceptance
from click.testing import CliRunner
from known_text import states
from known_text.decoding import KnownText, Lane, decode
from known_text.proposals import proposals_of
from known_text.states import StateStore

import mtp_mlx.cli as cli
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.folder import LAST_LAYER, HeadsConfig, heads_header
from mtp_mlx.drafters.heads.folder import save as save_heads
from mtp_mlx.drafters.masks import shortlist
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.drafters.memory.source import Memory
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.train.data import Example
from tests.drafters.heads.test_mtp_head import random_heads
from tests.drafters.memory.tables import memory_of
from tests.model.naive import random_adapter
from tests.tiny import VOCABULARY, never_end, save_tiny, tiny_model

PROMPTS = [(7,), tuple(range(20, 60))]
LENGTH = 28  # tokens of an answer
CONVENTION = HeadConvention("test")
KINDS: dict[str, dict[str, Any]] = {
    "slots": {},
    "slots of one mask": {"shared_mask": True, "sampler_width": 0},
}


def answers_of(attached: AttachedModel) -> list[Example]:
    """The model's own greedy answers."""
    found = []
    for prompt in PROMPTS:
        written = [item.token for item in mtp_generate_step(list(prompt), attached, max_tokens=LENGTH)]
        found.append(Example([*prompt, *written], len(prompt)))
    return found


def usual(examples: list[Example], count: int = 12) -> mx.array:
    """[count] int32, the most frequent tokens of the answers: with these alone, some drafts are right."""
    used = Counter(token for example in examples for token in example.tokens[example.loss_start :])
    return mx.array(sorted(token for token, _ in used.most_common(count)), dtype=mx.int32)


def drafting(kind: str, memory: Path) -> tuple[AttachedModel, list[Example]]:
    """A tiny model with a drafter and a memory that knows a part of its answers, and these."""
    model = tiny_model("llama", seed=3)
    plain = attach(model)
    examples = answers_of(plain)
    plain.detach()
    ids = usual(examples)
    if kind == "heads":
        speculator: Any = MTPHeads(random_heads(model, 2).heads, CONVENTION, ids, drafts=3)
    else:
        speculator = random_adapter(model, draft_ids=ids, **KINDS[kind])
    attached = attach(model, speculator)
    known = [(example.tokens[: LENGTH // 2 + example.loss_start], example.loss_start) for example in examples]
    attached.text_source = Memory(memory_of(memory, known), VOCABULARY)
    return attached, examples


@pytest.mark.parametrize("kind", [*KINDS, "heads"])
def test_steps_are_those_of_decoding(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts, accepted lengths and who drafted what are the same, with the drafter, the memory, and both."""
    monkeypatch.setattr(shortlist, "TOKENS", 3)  # of so small a vocabulary
    monkeypatch.setattr(shortlist, "WORTH", 2)
    attached, examples = drafting(kind, tmp_path / "a.mem")
    name = kind.split()[0]
    lanes = [Lane(name, "linear"), *([Lane(name, "quadratic")] if name == "slots" else [])]
    lanes += [Lane(who, "tree", rows) for who in (name, f"{name},memory") for rows in (3, 12)]
    lanes.append(Lane("memory", "tree", 6))
    store = StateStore(attached, tmp_path, {})
    accepted, bare = Counter[str](), 0
    for example in examples:
        known = KnownText(attached, example, proposals_of(attached, example, store(example)))
        for lane in lanes:
            found, wanted = (
                decode(known, example, lane, LENGTH, ()),
                decode(attached, example, lane, LENGTH, ()),
            )
            assert found.to_json() == wanted.to_json(), lane
            assert found.tokens == LENGTH
            accepted.update(found.drafted_by)
            bare += sum(count for layout, count in found.layouts.items() if "+0" in layout)
    assert accepted[name] > 10 and accepted["memory"] > 10
    assert bare > 10 or name == "heads"  # steps that have no slots behind some drafts


def test_a_text_of_another_model(tmp_path: Path) -> None:
    """It is refused, where decoding would have to go on with something else."""
    attached, examples = drafting("slots", tmp_path / "a.mem")
    other = Example([*examples[0].tokens[:-1], examples[0].tokens[-1] ^ 1], examples[0].loss_start)
    with pytest.raises(MTPError, match="greedy answers"):
        decode(attached, other, Lane("slots", "tree", 4), LENGTH, ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with slots, heads, its answers, one of which ended, and a memory of one of them."""
    root = tmp_path_factory.mktemp("tree")
    save_tiny(root / "model", "llama", seed=3)
    never_end(root / "model")
    prompts = [json.dumps({"prompt": f"add {i}", "category": f"c{i % 2}"}) for i in range(3)]
    (root / "prompts.jsonl").write_text("\n".join(prompts))
    options = ["-m", str(root / "model"), "--prompts", str(root / "prompts.jsonl"), "--max-tokens", "20"]
    made = CliRunner().invoke(cli.main, ["distill", *options, "--out", str(root / "answers.jsonl")])
    assert made.exit_code == 0, made.output
    made = CliRunner().invoke(
        cli.main,
        ["remember", "-m", str(root / "model"), str(root / "answers.jsonl"), "--out", str(root / "a.mem")],
    )
    assert made.exit_code == 0, made.output
    model = tiny_model("llama", seed=3)
    base, adapter = base_fingerprint(model), random_adapter(model)
    save_adapter(root / "slots", adapter, mask_header(adapter.config, "tiny", base))
    config = HeadsConfig(CONVENTION, [dict(LAST_LAYER)] * 2)
    heads = MTPHeads(random_heads(model, 2).heads, CONVENTION)
    save_heads(root / "heads", heads, heads_header(config, "tiny", base))
    return root


def run(folder: Path, *more: str) -> Any:
    """The benchmark, in this process."""
    options = ["--model", str(folder / "model"), "--data", str(folder / "answers.jsonl")]
    options += ["--adapter", str(folder / "heads"), "--adapter", str(folder / "slots")]
    options += ["--memory", str(folder / "a.mem"), "--states", str(folder / "states")]
    return CliRunner().invoke(tree_acceptance.main, [*options, "--rows", "4", "--rows", "8", *more])


def test_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for everything that drafts; a second run needs no pass of the model, and heads none where slots ran."""
    monkeypatch.setattr(tree_acceptance, "prefer_openblas", lambda: None)
    passes = []
    states_of = states.states_of
    monkeypatch.setattr(states, "states_of", lambda *given: passes.append(given) or states_of(*given))
    first = run(folder, "--check", "1", "--json")
    assert first.exit_code == 0, first.output
    found = {(row["drafts"], row["layout"], row["rows"]): row for row in json.loads(first.stdout)}
    both = ["heads", "slots", "heads,memory", "slots,memory", "memory"]
    assert set(found) == {(who, "tree", rows) for who in both for rows in (4, 8)} | {
        (who, "linear", None) for who in both[:2]
    }
    assert len(passes) == 3
    for row in found.values():
        assert (row["checked"], row["different"], row["tokens"]) == (1, 0, 60)
        assert set(row["tokens_per_step"]) == {"c0", "c1", "all"}
    assert found["slots,memory", "tree", 8]["tokens_per_step"]["all"] > 1.5
    second = run(folder, "--layout", "tree", "--limit", "2")
    assert second.exit_code == 0 and len(passes) == 3, second.output
    assert "| drafts | 4 rows | 8 rows |" in second.stdout and "| slots + memory |" in second.stdout
    assert "40 tokens of answers.jsonl" in second.stdout


def test_damaged_states(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_acceptance, "prefer_openblas", lambda: None)
    assert run(folder).exit_code == 0
    for path in (folder / "states").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:40])
    damaged = run(folder)
    assert damaged.exit_code == 2 and "delete the file" in damaged.output
