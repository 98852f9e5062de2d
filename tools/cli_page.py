"""Write docs/cli.md from the commands: `python tools/cli_page.py`; `--check` only compares.

The page is made from the click objects (arguments, options, defaults, help, examples), not from the rendered help, so
it does not depend on the version of click or the width of the terminal.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

import mtp_mlx.cli as cli
from mtp_mlx.config import RenamedOption

NOT_RUN = "<!-- not run: {} -->\n"  # for tests/test_docs.py, which runs the blocks of pages
PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# Command line

Generated from the commands by `python tools/cli_page.py`; a test checks that it is up to date.

Text and JSON go to stdout, everything else to stderr. An error that you can fix is reported in one sentence, with
exit code 2; after Ctrl-C the exit code is 130. `MTP_MLX_RAISE=1` shows the traceback instead of the sentence.
"""


def page() -> str:
    """The whole page."""
    context = click.Context(cli.main, info_name="mtp-mlx")
    verbs = cli.main.list_commands(context)
    parts = [HEAD, "| command | does |\n|---|---|"]
    parts[-1] += "".join(f"\n| [`mtp-mlx {verb}`](#mtp-mlx-{verb}) | {cli.VERBS[verb]} |" for verb in verbs)
    for verb in verbs:
        command = cli.main.get_command(context, verb)
        assert command is not None, verb
        parts.append(section(verb, command))
        for name, inner in own_commands(command).items():
            parts.append(section(f"{verb} {name}", inner, command))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def own_commands(command: click.Command) -> dict[str, click.Command]:
    """The subcommands of a verb, such as `ptp` of `mtp-mlx train`."""
    return dict(command.commands) if isinstance(command, click.Group) else {}


def section(verb: str, command: click.Command, group: click.Command | None = None) -> str:
    """One command: usage, text, options, examples; for a subcommand, only what `group` does not have already."""
    arguments = [_argument(p) for p in command.params if _is_argument(p)]
    if isinstance(command, click.Group):
        arguments.append(command.subcommand_metavar)
    usage = " ".join([f"mtp-mlx {verb}", "[OPTIONS]", *arguments])
    usage = NOT_RUN.format("usage, not a command") + f"```\n{usage}\n```"
    said = (command.help or "").partition("\n\n")[0] if group else command.help or ""
    parts = [f"{'###' if group else '##'} mtp-mlx {verb}", usage, _prose(said)]
    if inner := own_commands(command):
        links = (f"[`mtp-mlx {verb} {name}`](#mtp-mlx-{verb}-{name})" for name in inner)
        parts.append(f"Each of these has options of its own: {', '.join(links)}.")
    if group:
        above = verb.rpartition(" ")[0]
        parts.append(f"In addition to the [options of `mtp-mlx {above}`](#mtp-mlx-{above}):")
    known = {option.name for option in shown_options(group)} if group else set()
    options = [option for option in shown_options(command) if option.name not in known]
    rows = [f"| {_names(option)} | {_default(option)} | {_cell(option.help or '')} |" for option in options]
    parts.append("\n".join(["| option | default | does |", "|---|---|---|", *rows]))
    examples = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
    if examples:
        reason = NOT_RUN.format("examples name files of yours; tests/cli/test_page.py reads them")
        parts.append(reason + "```\n" + "\n".join(examples) + "\n```")
    return "\n\n".join(parts)


def shown_options(command: click.Command) -> list[click.Option]:
    """The options of a command that its help shows."""
    return [one for one in command.params if isinstance(one, click.Option) and not one.hidden]


def shown_names(option: click.Option) -> list[str]:
    """The names of an option that its help shows: all but an old one."""
    return option.opts[:-1] if isinstance(option, RenamedOption) else option.opts


def _is_argument(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Argument)


def _argument(parameter: click.Parameter) -> str:
    name = (parameter.name or "").upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _names(option: click.Option) -> str:
    """Such as `-m`, `--model TEXT`, or `--exact` / `--no-exact`."""
    names = ", ".join(f"`{name}`" for name in sorted(shown_names(option), key=len))
    if option.secondary_opts:
        return f"{names} / " + ", ".join(f"`{name}`" for name in option.secondary_opts)
    if option.is_flag:
        return names
    if isinstance(option.type, click.Choice):
        return f"{names} " + _cell(" | ".join(str(choice) for choice in option.type.choices))
    return f"{names} {option.type.name.upper()}".replace(" RANGE", "")


def _default(option: click.Option) -> str:
    """The default as `--help` shows it; options of settings have it as text, because their click default is None."""
    shown: Any = option.show_default
    if isinstance(shown, str):
        return _cell(shown)
    if not shown or option.default in (None, (), []):
        return ""
    return _cell(str(option.default))


def _prose(text: str) -> str:
    """A docstring's paragraphs, each on one line."""
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(" ".join(line.strip() for line in paragraph.splitlines()) for paragraph in paragraphs)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Write the page, or compare it with --check; returns 1 if it is not up to date."""
    if arguments not in ([], ["--check"]):
        print("usage: python tools/cli_page.py [--check]", file=sys.stderr)
        return 2
    current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if current == page():
        return 0
    if arguments:
        print(f"{PAGE} is out of date: run python tools/cli_page.py", file=sys.stderr)
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
