"""`mtp-mlx push`: publish an adapter folder on the model hub, with a generated card."""

from __future__ import annotations

from pathlib import Path

import click

EPILOG = """\b
Examples:
  mtp-mlx push ./adapter someone/smollm2-mtp --dry-run
  mtp-mlx push ./adapter someone/smollm2-mtp --data "2,000 answers of the model itself to licensed prompts"
  mtp-mlx push ./adapter someone/my-adapter --base someone/my-model --public
"""


@click.command(epilog=EPILOG, short_help="Publish an adapter folder on the model hub")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--base", help="Hub id of the base model, if the adapter names it by a path")
@click.option("--data", help="What the adapter was trained on, for the card")
@click.option("--license", "license_name", help="Licence of the adapter, such as apache-2.0")
@click.option("--public/--private", default=False, show_default=True, help="Who can see a new repository")
@click.option("--dry-run", is_flag=True, help="Print the card and push nothing")
def command(
    folder: Path,
    repository: str,
    base: str | None,
    data: str | None,
    license_name: str | None,
    public: bool,
    dry_run: bool,
) -> None:
    """Upload the adapter in FOLDER to REPOSITORY (owner/name), with a model card.

    You must be logged in (`hf auth login`). A new repository is private unless --public is given.
    """
    from mtp_mlx import hub

    description = hub.Description(base, data, license_name)
    if dry_run:
        click.echo(hub.published(folder, hub.check_repository(repository), description)[1])
        return
    click.echo(hub.push(folder, repository, description, private=not public))
