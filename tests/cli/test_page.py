"""Proves that docs/cli.md is what the commands say, and that each command's examples and choices are right."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import cli_page
import click
import pytest
from click.testing import CliRunner

import mtp_mlx.cli as cli

CONTEXT = click.Context(cli.main)
VERBS = cli.main.list_commands(CONTEXT)


def command_of(verb: str) -> click.Command:
    """Of a verb, or of a verb and one of its own commands, as in "train ptp"."""
    name, _, inner = verb.partition(" ")
    command = cli.main.get_command(CONTEXT, name)
    if inner:
        assert isinstance(command, click.Group)
        command = command.get_command(CONTEXT, inner)
    assert command is not None
    return command


COMMANDS = [
    f"{verb}{inner}"
    for verb in VERBS
    for inner in ("", *(f" {name}" for name in cli_page.own_commands(command_of(verb))))
]


def examples(verb: str) -> list[str]:
    epilog = command_of(verb).epilog or ""
    assert "Examples:" in epilog, f"{verb} has no examples"
    whole = epilog.split("Examples:")[1].replace("\\\n", " ")  # a backslash goes on in the next line
    return [re.sub(r"\s+", " ", line.strip()) for line in whole.splitlines() if line.strip()]


def test_the_page_is_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli_page.main(["--check"]) == 0, "run python tools/cli_page.py"
    monkeypatch.setattr(cli_page, "PAGE", tmp_path / "cli.md")
    assert cli_page.main(["--check"]) == 1 and not (tmp_path / "cli.md").exists()
    assert cli_page.main([]) == 0 == cli_page.main(["--check"])
    assert cli_page.main(["--chek"]) == 2


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_page_has_every_option(verb: str) -> None:
    """In the command's section, or in that of the verb it belongs to."""
    text = cli_page.page().split(f"\n## mtp-mlx {verb.split()[0]}\n")[1].split("\n## ")[0]
    above, *sections = re.split(r"\n### mtp-mlx (.*)\n", text)
    if " " in verb:
        text = above + dict(zip(sections[::2], sections[1::2], strict=True))[verb]
    for parameter in cli_page.shown_options(command_of(verb)):
        assert all(
            f"`{name}`" in text for name in (*cli_page.shown_names(parameter), *parameter.secondary_opts)
        ), parameter.name
        old = set(parameter.opts) - set(cli_page.shown_names(parameter))
        assert not any(f"`{name}`" in text for name in old), "an old name is hidden"
        assert parameter.help and parameter.help.replace("|", "\\|") in text
        assert not parameter.help.endswith("."), f"{verb}: {parameter.help}"
    flat = re.sub(r"\s+", " ", text.replace("\\\n", " "))
    assert all(example in flat for example in examples(verb))


@pytest.mark.parametrize("verb", COMMANDS)
def test_examples_can_be_run_as_they_stand(verb: str) -> None:
    """Each is this program's, its values are of the right types, and one of them is this command's."""
    shown = examples(verb)
    assert any(f"mtp-mlx {verb}" in example for example in shown)
    for example in shown:
        if example.startswith("curl "):  # what a user of a running server does
            continue
        line = example.partition(" -- ")[2] if example.startswith("mlx.launch ") else example
        line = re.sub(r"^[A-Z_]+=\S+ ", "", line.rsplit(" | ", 1)[-1])
        program, named, *words = shlex.split(line)
        assert program == "mtp-mlx", example
        if words and words[0] in cli_page.own_commands(command_of(named)):
            named = f"{named} {words.pop(0)}"
        command_of(named).make_context(named, words)


def choices() -> Iterator[tuple[str, str, list[str]]]:
    for verb in COMMANDS:
        for parameter in command_of(verb).params:
            if isinstance(parameter, click.Option) and isinstance(parameter.type, click.Choice):
                yield verb, max(parameter.opts, key=len), [str(choice) for choice in parameter.type.choices]


@pytest.mark.parametrize(("verb", "option", "right"), list(choices()), ids=lambda value: str(value))
def test_a_wrong_value_names_the_right_ones(verb: str, option: str, right: list[str]) -> None:
    result = CliRunner().invoke(cli.main, [*verb.split(), option, "nonsense"])
    assert result.exit_code == 2 and result.stdout == ""
    assert all(f"'{choice}'" in result.stderr for choice in right) and option in result.stderr


# What a newcomer gets wrong first, by command: the arguments, and what the one sentence says.
FIRST_MISTAKES: dict[str, tuple[list[str], str]] = {
    "generate": (["--model", "nowhere", "--prompt", "x"], "no model 'nowhere'"),
    "chat": (["--model", "nowhere"], "no model 'nowhere'"),
    "serve": (["--host", "0.0.0.0"], "give --api-key-file"),
    "push": (["./nowhere", "someone/adapter"], "nowhere is not a folder"),
    "pull": (["adapter"], "give OWNER/NAME"),
    "train": (["--out", "adapter"], "--data is missing"),
    "remember": (["none.jsonl", "--out", "x.mem"], "none.jsonl"),
    "cache-prompt": (["--prompt", "x", "--out", "kept.txt"], "must end in .safetensors"),
    "distill": (["--out", "answers.jsonl"], "--prompts is missing"),
    "convert": (["none.gguf", "out"], "none.gguf"),
    "info": (["nowhere"], "nowhere does not exist"),
    "doctor": (["--kernel"], "--kernels"),
    "bench": (["--prompts", "none.jsonl"], "none.jsonl"),
    "eval": (["--gsm8k", "none.jsonl"], "none.jsonl"),
    "tune": (["--prompts", "none.jsonl"], "none.jsonl"),
    "plan": (["--curve", "m9"], "choose one of m3-ultra, m4-pro, m5-max"),
}


def test_every_command_has_a_first_mistake() -> None:
    assert set(VERBS) <= set(FIRST_MISTAKES), (
        "a new command: add the first mistake that a user of it would make"
    )


@pytest.mark.parametrize("verb", [verb for verb in FIRST_MISTAKES if verb in VERBS])
def test_first_mistakes_are_one_sentence(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MTP_MLX_API_KEY", raising=False)
    arguments, message = FIRST_MISTAKES[verb]
    result = CliRunner().invoke(cli.main, [verb, *arguments], input="")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert "Traceback" not in result.output and result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == [], (
        "nothing is written"
    )
