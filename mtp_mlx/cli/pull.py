"""`mtp-mlx pull`: an adapter folder from a repository of the model hub."""

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
    """Download the adapter of REPOSITORY (owner/name) into a folder that --adapter takes."""
    from mtp_mlx import hub

    out = out or Path(hub.check_repository(repository).rpartition("/")[2])
    config = hub.pull(repository, out, revision)
    base, acceptance = config["base"]["name"], config.get("acceptance") or []
    if as_json:
        found = {"out": str(out), "base": base, "method": config.get("method"), "acceptance": acceptance}
        click.echo(json.dumps(found))
        return
    depths = " ".join(f"{value:.2f}" for value in acceptance) or "not measured"
    click.echo(f"{config.get('method')} adapter for {base}, acceptance by depth {depths} -> {out}", err=True)
    click.echo(f'mtp-mlx generate --model {base} --adapter {out} --prompt "..."')
