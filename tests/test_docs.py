"""The documentation tells the truth: every Python block and every `mtp-mlx` line of README and docs/ is executed.

In reduced form: on a tiny model, with few tokens and steps. What cannot run here has `<!-- not run: REASON -->` above
it. A `text` block right behind a Python block is what that block prints, to the letter.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import mtp_mlx.cli as cli
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import random_adapter
from tests.test_lora import fine_tune
from tests.tiny import save_tiny, tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M
)
SHELL = ("", "sh", "bash", "shell", "console")
WAITING = ("serve", "chat")  # go on until they are stopped: only their options are checked
NETWORK = ("push", "pull")  # need a hub: only their options are checked
# What makes a command small; put behind its own options, so that these win.
SMALLER = {
    "generate": ["--max-tokens", "8"],
    "bench": ["--limit", "1", "--max-tokens", "4"],
    "eval": ["--limit", "1", "--max-tokens", "4"],
    "tune": ["--limit", "1", "--max-tokens", "4"],
    "distill": ["--limit", "6", "--max-tokens", "12"],
    "train": [
        "--steps",
        "2",
        "--warmup",
        "1",
        "--measure-every",
        "0",
        "--held-out",
        "1",
        "--max-length",
        "200",
    ],
}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    line: int
    language: str
    text: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, match.start()) + 1, match["language"], match["text"], match["reason"])
        for match in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[str]:
    """The `mtp-mlx` commands of a shell block: continued lines joined, launchers, pipes and remarks left out."""
    lines = re.sub(r"\s*\\\n\s*", " ", block.text).splitlines()
    found = []
    for line in lines:
        line = re.sub(r"^\$ ", "", line.strip())
        line = line.rpartition("| ")[2] if "| mtp-mlx" in line else line
        line = line.partition(" -- ")[2] if line.startswith("mlx.launch ") else line
        if line.startswith("mtp-mlx "):
            found.append(re.split(r"\s{3,}|\s+#|\s+&$", line)[0])
    return found


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, in which smollm2-135m is a tiny model and the files that pages speak of are there."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "reader"
    model = save_tiny(home / "model", "llama", seed=3)
    base = tiny_model("llama", seed=3)
    adapter = random_adapter(base)
    info = mask_header(adapter.config, "tiny", base_fingerprint(base), acceptance=[0.5, 0.4, 0.3, 0.2])
    for folder in ("adapter", "compare/conf-adapt"):
        save_adapter(home / folder, adapter, info)
    rows = [{"prompt": f"print({n})", "completion": "the fox and the dog " * 2} for n in range(8)]
    questions = [{"prompt": f"What is {n}?", "question": f"What is {n}?", "category": "qa", "answer": str(n)} for n in range(8)]  # fmt: skip  # noqa: E501
    for name in ("data", "answers"):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("prompts", "spec_bench", "mt_bench", "gsm8k", "gsm8k_test", "questions"):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    code = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f"}
    (home / "humaneval.jsonl").write_text(json.dumps(code) + "\n")
    fine_tune(home / "adapters", tiny_model("llama", seed=3))
    (home / "question.txt").write_text("Why is the sky blue?\n")
    shutil.copytree(ROOT / "recipes", home / "recipes")
    shutil.copy(home / "data.jsonl", home / "mixture.jsonl")
    (home / "train.yaml").write_text("data: data.jsonl\nout: adapter\n")
    monkeypatch.setattr("mtp_mlx.models.embedded_model", lambda *_, **__: model)
    for module in ("mtp_mlx.models", "mtp_mlx.adapter_sources"):
        monkeypatch.setattr(f"{module}.bundled_adapter", lambda name: home / "adapter" if name == "smollm2-135m" else None)  # fmt: skip  # noqa: E501
    monkeypatch.setattr("mtp_mlx.api.bundled_memory", lambda name: None)  # of another tokenizer
    monkeypatch.setattr("mtp_mlx.adapter_sources.named_adapter", lambda name: home / "adapter" if name == "demo-heads" else Path(name))  # fmt: skip  # noqa: E501
    monkeypatch.chdir(home)
    return home


def run_command(line: str, home: Path) -> None:
    """Runs a command in reduced form; what earlier runs left to go on from is removed."""
    words = shlex.split(line)[1:]
    command = cli.main.get_command(click.Context(cli.main), words[0])
    assert command is not None, f"{line}: there is no such command"
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = {word for word in words if word.startswith("--")} - known - {"--help"}
    assert not unknown, f"{line}: {unknown}"
    if words[0] in WAITING + NETWORK:
        command.make_context(words[0], words[1:], resilient_parsing=True)
        return
    for old in (*home.glob("*.checkpoint.safetensors"), *home.glob("*.metrics.jsonl")):
        old.unlink()
    if words[0] == "distill":
        Path(words[words.index("--out") + 1]).unlink(missing_ok=True)
    smaller = SMALLER.get(words[0], [])
    pairs = [pair for pair in zip(smaller[::2], smaller[1::2], strict=True) if pair[0] in known]
    result = CliRunner().invoke(
        cli.main, [*words, *(word for pair in pairs for word in pair)], input="The sky"
    )
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, reader: Path) -> None:
    names: dict[str, Any] = {"__name__": "__docs__"}
    printed = None
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.reason is not None:
            assert len(block.reason.split()) >= 3, f"{where}: say why it is not run"
            printed = None
        elif block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, where, "exec"), names)
            printed = out.getvalue()
        elif block.language == "text":
            assert printed is not None and printed.rstrip("\n") == block.text.rstrip("\n"), where
        elif block.language in SHELL:
            for line in commands(block):
                run_command(line, reader)
            printed = None
        else:
            pytest.fail(
                f"{where}: a {block.language} block can be executed by nobody here; mark it as not run"
            )


def test_linked_pages_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            optional = page.name == "mac-apps.md" and name == "server.md"  # comes with the server
            assert optional or (page.parent / name).exists(), f"{page.name}: {name}"


def test_pages_name_files_that_exist() -> None:
    for page in PAGES:
        named = re.findall(
            r"`((?:examples|tests|benchmarks|recipes|docs|dev|mtp_mlx)/[\w./-]+)`",
            page.read_text(encoding="utf-8"),
        )
        missing = [name for name in named if not (ROOT / name).exists()]
        assert missing == [], page.name


# --- the reader of pages itself -------------------------------------------------------------------------------


def test_commands_are_found_in_every_form() -> None:
    text = "make demo\n$ mtp-mlx info x   # a remark\ncat a | mtp-mlx generate --raw\nmtp-mlx serve &\n"
    text += "mlx.launch -n 2 -- mtp-mlx train \\\n  --out b\nmtp-mlx doctor      says more\n"
    assert commands(Block(1, "", text, None)) == [
        "mtp-mlx info x", "mtp-mlx generate --raw", "mtp-mlx serve", "mtp-mlx train --out b", "mtp-mlx doctor",
    ]  # fmt: skip


def test_a_lie_is_found(reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, error in (
        ("```\nmtp-mlx generate --prompt x --depht 3\n```\n", "--depht"),
        ("```\nmtp-mlx generate -m nowhere/at/all --prompt x\n```\n", "nowhere"),
        ("```python\nimport mtp_mlx\nmtp_mlx.nothing\n```\n", "nothing"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "line 5"),
        ("```swift\nlet a = 1\n```\n", "swift"),
    ):
        page = tmp_path / "page.md"
        page.write_text(text)
        with pytest.raises((AssertionError, AttributeError, pytest.fail.Exception), match=error):
            test_every_block_of_a_page_runs(page, reader)
        page.write_text("<!-- not run: needs a network connection -->\n" + text.split("\n\n")[0] + "\n")
        test_every_block_of_a_page_runs(page, reader)


def test_the_api_page_is_what_the_docstrings_say() -> None:
    """Mended by `python tools/api_page.py`."""
    names = runpy.run_path(str(ROOT / "tools" / "api_page.py"))
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == names["page"]()
