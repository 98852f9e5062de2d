"""The README tells the truth: its Python block runs, and every command, option, target and file in it exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

import mtp_mlx
import mtp_mlx.cli as cli
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import random_adapter
from tests.tiny import save_tiny, tiny_model

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
PYTHON = [block for language, block in BLOCKS if language == "python"]
SHELL = [line for language, block in BLOCKS if not language for line in block.splitlines()]
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))


@pytest.mark.parametrize("with_adapter", [True, False])
def test_python_block_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, with_adapter: bool
) -> None:
    """The block as it stands, with the model's name replaced by a tiny folder."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    model = save_tiny(tmp_path / "model", seed=3)
    load = f'load("{model}")'
    if with_adapter:
        base = tiny_model(seed=3)
        adapter = random_adapter(base)
        save_adapter(
            tmp_path / "adapter", adapter, mask_header(adapter.config, "tiny", base_fingerprint(base))
        )
        load = f'load("{model}", "{tmp_path / "adapter"}")'
    assert len(PYTHON) == 1 and PYTHON[0].count('load("smollm2-135m")') == 1
    exec(compile(PYTHON[0].replace('load("smollm2-135m")', load), "README.md", "exec"), {})
    assert re.search(r"\d+ tokens in \d+ forward passes", capsys.readouterr().out)


def test_commands_and_their_options_exist() -> None:
    commands = [line for line in [*SHELL, *INLINE] if line.startswith("mtp-mlx ")]
    assert len(commands) >= 12
    for line in commands:
        _, verb, *words = shlex.split(line, comments=True)
        command = cli.main.get_command(click.Context(cli.main), verb)
        assert command is not None, line
        command.make_context(verb, words, resilient_parsing=True)
        known = {
            name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in words if word.startswith("-")} <= known, line


def test_inline_options_belong_to_some_command() -> None:
    commands = [cli.main.get_command(click.Context(cli.main), verb) for verb in cli.VERBS]
    known = {
        name for command in commands if command for parameter in command.params for name in parameter.opts
    }
    assert {word.split()[0] for word in INLINE if word.startswith("--")} <= known | {"--help"}


def test_every_verb_is_in_the_overview() -> None:
    assert all(f"| `mtp-mlx {verb}` |" in TEXT for verb in cli.VERBS)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in SHELL if line.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_files_exist() -> None:
    names = [name for name in INLINE if re.fullmatch(r"[\w./-]+/?", name) and ("/" in name or name.isupper())]
    names += re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)
    assert len(names) >= 12
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_public_names_exist() -> None:
    imported = re.findall(r"from mtp_mlx import (.*)", PYTHON[0])[0].split(", ")
    assert set(imported) | {"mtp_generate_step"} <= set(mtp_mlx.__all__)


def test_the_figure_names_the_command_that_prints_it() -> None:
    """And stands in the table that docs/measured.md has of it, as the ratio of totals."""
    said = re.search(r"([\d.]+) times as many tokens a second", TEXT)
    assert said is not None
    command = next(line for line in SHELL if line.startswith("mtp-mlx bench"))
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    row = page.split(command)[1].split("| all |")[1].splitlines()[0].split("|")
    prompts, plain, drafted, ratio = (cell.split()[0] for cell in row[:4])
    assert prompts == "240" and ratio == said[1] and f"{float(drafted) / float(plain):.2f}" == ratio
