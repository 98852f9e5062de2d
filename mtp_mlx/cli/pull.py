"""`mtp-mlx pull`: get an adapter folder from the model hub."""

from __future__ import annotations

import json
from pathlib import Path

import click

EPILOG = """\b
Examples:
  mtp-mlx pull someone/smollm2-mtp
  mtp-mlx pull someone/smollm2-mtp --out ./adapter --revision v1
"""


@click.command(epilog=EPILOG, short_help="Get an adapter folder from the model hub")
@click.argument("repository")
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), help="Folder to write (default: the repository's name)"
)
@click.option("--revision", help="Branch, tag or commit")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout")
def command(repository: str, out: Path | None, revision: str | None, as_json: bool) -> None:
    """Download the adapter in REPOSITORY (owner/name) into a folder for --adapter."""
    from mtp_mlx import hub

    out = out or Path(hub.check_repository(repository).rpartition("/")[2])
    header = hub.pull(repository, out, revision)
    base, method, acceptance = header.base_name, header.method, header.acceptance
    if as_json:
        click.echo(json.dumps({"out": str(out), "base": base, "method": method, "acceptance": acceptance}))
        return
    depths = " ".join(f"{value:.2f}" for value in acceptance) or "not measured"
    click.echo(f"{method} adapter for {base}, acceptance by depth {depths} -> {out}", err=True)
    click.echo(f'mtp-mlx generate --model {base} --adapter {out} --prompt "..."')
