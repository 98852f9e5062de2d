"""The recipes of the bundled drafters are valid settings; mixture.py gives sources and categories their shares."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import mixture
import pytest
from click.testing import CliRunner, Result

from mtp_mlx.cli.train_options import settings_from
from mtp_mlx.drafters.heads.options import HeadsSettings
from mtp_mlx.drafters.masks.options import MaskTokenSettings
from mtp_mlx.train.data import load_examples
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"


@pytest.mark.parametrize("name, kind", [("mask-tokens", MaskTokenSettings), ("mtp-heads", HeadsSettings)])
def test_settings(name: str, kind: type) -> None:
    """As `mtp-mlx train METHOD --config` reads them; the page on training names the file."""
    given = {"data": Path("mixture.jsonl"), "out": Path("adapter")}
    settings = settings_from(RECIPES / f"{name}.yaml", given, name)
    assert type(settings) is kind and settings.ema and settings.learn_from == "all"  # type: ignore[attr-defined]
    assert f"recipes/{name}.yaml" in (ROOT / "docs" / "training.md").read_text()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(mixture.main, arguments)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Own answers of two categories, one by id; written ones, one by prompt; a text; shares; prompts."""
    code = [{"prompt": f"write {n}", "response": "x = 1", "category": "code"} for n in range(6)]
    write(
        tmp_path / "own.jsonl",
        [*code, {"id": 7, "prompt": "sum up", "response": "short", "temperature": 0.7}],
    )
    written = [
        {"prompt": "add", "completion": "2", "category": "math"},
        {"prompt": "why", "completion": "so"},
    ]
    write(tmp_path / "written.jsonl", written)
    (tmp_path / "text.txt").write_text("\n\n".join(["Friends, " * 100] * 4))
    (tmp_path / "shares.yaml").write_text("code: 1\nqa: 3\nmath: 1\n")
    write(
        tmp_path / "prompts.jsonl",
        [{"id": 7, "prompt": "sum up", "category": "qa"}, {"prompt": "why", "category": "qa"}],
    )
    return tmp_path


def test_shares(files: Path) -> None:
    out = files / "mixture.jsonl"
    sources = [f"{files / 'own.jsonl'}:6", f"{files / 'written.jsonl'}:3", f"{files / 'text.txt'}:1"]
    options = ["--categories", str(files / "shares.yaml"), "--prompts", str(files / "prompts.jsonl")]
    result = run(*sources, *options, "--out", str(out))
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 6 + 1 + 2 + 4 and not any("category" in row for row in rows)
    seen: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        first = row.get("prompt", "a text").split()[0]
        seen[first] += row["weight"] / len(rows)
    assert {name: round(share, 4) for name, share in seen.items()} == {
        "write": 0.15,  # a quarter of the first source
        "sum": 0.45,
        "add": 0.075,
        "why": 0.225,
        "a": 0.1,
    }
    examples, _ = load_examples(out, tiny_tokenizer(), 1024)
    assert [example.weight for example in examples] == [row["weight"] for row in rows]


def test_sampled_answers(files: Path) -> None:
    """With and without categories, whose shares stay."""
    out, own = files / "mixture.jsonl", str(files / "own.jsonl")
    more = write(files / "more.jsonl", [{"id": 7, "prompt": "sum up", "response": "greedy"}])
    assert run(f"{own},{more}:1", "--sampled", "0.5", "--out", str(out)).exit_code == 0
    *_, sampled, greedy = [json.loads(line)["weight"] for line in out.read_text().splitlines()]
    assert sampled == pytest.approx(greedy / 2, rel=1e-4)
    options = ["--categories", str(files / "shares.yaml"), "--prompts", str(files / "prompts.jsonl")]
    assert run(f"{own},{more}:1", "--sampled", "0.5", *options, "--out", str(out)).exit_code == 0
    *code, sampled, greedy = [json.loads(line)["weight"] for line in out.read_text().splitlines()]
    assert sampled == pytest.approx(greedy / 2, rel=1e-4)
    assert sum(code) / 8 == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("own.jsonl", [], "FILE:SHARE"),
        ("own.jsonl:-1", [], "positive"),
        ("none.jsonl:1", [], "none.jsonl"),
        ("own.jsonl:1", ["--categories", "shares.yaml"], 'row 7 has no "category"'),
        ("own.jsonl:1", ["--categories", "few.yaml", "--prompts", "prompts.jsonl"], "rows of qa"),
        ("own.jsonl:1", ["--categories", "own.jsonl"], "own.jsonl: cannot be read"),
        ("own.jsonl:1", ["--categories", "list.yaml"], "category: share"),
    ],
)
def test_refusals(
    files: Path, monkeypatch: pytest.MonkeyPatch, source: str, options: list[str], message: str
) -> None:
    monkeypatch.chdir(files)
    (files / "few.yaml").write_text("code: 1\n")
    (files / "list.yaml").write_text("- code\n")
    result = run(source, *options, "--out", "mixture.jsonl")
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (files / "mixture.jsonl").exists()
