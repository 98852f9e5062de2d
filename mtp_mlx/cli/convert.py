"""`mtp-mlx convert`: a checkpoint of another format -> an mlx-lm model folder, or its MTP heads -> an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.convert.whole import WholeSettings

EPILOG = """\b
Examples:
  mtp-mlx convert model.Q8_0.gguf ./model
  mtp-mlx convert model.Q8_0.gguf ./model-4bit --quantize 4
  mtp-mlx convert ./MiMo-7B-RL ./mimo --quantize 4
  mtp-mlx convert ./Qwen3.5-0.8B --dry-run
  mtp-mlx convert ./Qwen3.5-0.8B ./heads --heads-only
"""


@click.command(epilog=EPILOG, short_help="Convert a checkpoint to an mlx-lm model folder")
@click.argument("source")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--quantize", type=click.Choice(["4", "8"]), help="Quantise the weights to this many bits")
@click.option(
    "--group-size", type=click.Choice(["32", "64"]), default="64", help="Weights that share a scale"
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the weights (default: the checkpoint's; of .gguf float32 on CPU, bfloat16 on Metal)",
)
@click.option("--heads-only", is_flag=True, help="Write only the MTP heads, as an adapter folder")
@click.option("--trunk-only", is_flag=True, help="Leave the MTP heads out")
@click.option(
    "--heads-as",
    type=click.Choice(["adapter", "speculators"]),
    default="adapter",
    show_default=True,
    help="Layout of the folder that --heads-only writes",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done; OUT is not needed")
@click.option(
    "--head-norms",
    type=click.Choice(["auto", "plain", "zero-centred"]),
    default="auto",
    show_default=True,
    help="How the file stores the heads' norms",
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a folder of the same kind already")
def command(
    source: str,
    out: Path | None,
    quantize: str | None,
    group_size: str,
    dtype: str | None,
    heads_only: bool,
    trunk_only: bool,
    heads_as: str,
    dry_run: bool,
    head_norms: str,
    force: bool,
) -> None:
    """Convert SOURCE into the model folder OUT.

    SOURCE is a checkpoint: a folder, a .safetensors, .bin, .pt, .pth, .ckpt or .gguf file, or a hub id. Its MTP heads,
    if it has any, become the adapter folder OUT/mtp, which is used with the model unless --adapter none is given.
    PyTorch files are read without running the code in them.
    """
    if heads_only and trunk_only:
        raise click.UsageError("--heads-only and --trunk-only leave nothing to convert: give one of them.")
    path = _local(source, dry_run)
    gguf = path.suffix.lower() == ".gguf" and not path.is_dir()
    if dry_run:
        click.echo("\n".join(_gguf_lines(path) if gguf else _plan_lines(path, head_norms, heads_only)))
        return
    if out is None:
        raise click.UsageError("Missing argument 'OUT' (only --dry-run does without).")
    if heads_only:
        click.echo(_convert_heads(path, out, heads_as, head_norms, force))
    elif gguf:
        click.echo(_convert_gguf(path, out, dtype, quantize, group_size, force))
    else:
        from mtp_mlx.convert.whole import WholeSettings

        bits = int(quantize) if quantize else None
        settings = WholeSettings(dtype, bits, int(group_size), head_norms, not trunk_only, force)
        click.echo(_convert_whole(path, out, settings))


def _local(source: str, dry_run: bool) -> Path:
    from mtp_mlx.convert.hub import is_hub_id, local_source

    if not is_hub_id(source):
        return local_source(source)
    if dry_run:
        raise MTPError(f"{source}: --dry-run reads local files and downloads nothing; download the checkpoint first")
    with Console(stderr=True).status(f"getting {source} from the hub"):
        return local_source(source)


def _convert_gguf(
    source: Path, out: Path, dtype: str | None, quantize: str | None, group_size: str, force: bool
) -> Path:
    from mtp_mlx.convert.gguf import convert_gguf

    with Console(stderr=True).status(f"converting {source.name}") as status:
        return convert_gguf(
            source,
            out,
            dtype=dtype,
            quantize=int(quantize) if quantize else None,
            group_size=int(group_size),
            force=force,
            progress=lambda stage: status.update(f"{source.name}: {stage}"),
        )


def _convert_whole(source: Path, out: Path, settings: WholeSettings) -> Path:
    """The folder, after what there is to say about it went to stderr."""
    from mtp_mlx.convert.whole import convert_whole, report_lines

    with Console(stderr=True).status(f"converting {source.name}") as status:
        result = convert_whole(source, out, settings, lambda stage: status.update(f"{source.name}: {stage}"))
    for line in report_lines(result):
        click.echo(line, err=True)
    return result.folder


def _convert_heads(source: Path, out: Path, layout: str, norms: str, force: bool) -> Path:
    if source.suffix.lower() == ".gguf" and source.is_file():
        raise MTPError(f"{source}: MTP heads are not read from .gguf files; use the original checkpoint")
    from mtp_mlx.convert.checkpoint import open_checkpoint
    from mtp_mlx.convert.heads_plan import plan_heads
    from mtp_mlx.convert.heads_speculators import write_speculators
    from mtp_mlx.convert.heads_write import write_heads

    with Console(stderr=True).status(f"reading {source.name}") as status:
        checkpoint = open_checkpoint(source)
        if layout == "speculators":
            return write_speculators(checkpoint, out, force=force)
        plan = plan_heads(checkpoint, norms)
        return write_heads(checkpoint, plan, out, force=force, progress=status.update)


def _plan_lines(source: Path, norms: str, heads_only: bool) -> list[str]:
    """The plan of a checkpoint's heads; without heads, what the checkpoint is."""
    from mtp_mlx.convert.checkpoint import open_checkpoint
    from mtp_mlx.convert.heads_plan import find_heads, plan_heads
    from mtp_mlx.convert.heads_report import plan_lines, types

    checkpoint = open_checkpoint(source)
    if heads_only or find_heads(checkpoint) is not None:
        return plan_lines(checkpoint, plan_heads(checkpoint, norms))
    return [
        f"source: {source} ({checkpoint.container}, {len(checkpoint.files)} file(s), {len(checkpoint.tensors)} "
        f"tensors: {types(checkpoint)})",
        f"model type: {checkpoint.text_config.get('model_type', '?')}",
        "heads: none",
    ]


def _gguf_lines(source: Path) -> list[str]:
    from mtp_mlx.convert.gguf_file import read_gguf

    header = read_gguf(source)
    kinds = sorted({info.type_name for info in header.tensors.values()})
    return [
        f"source: {source} (gguf, {len(header.tensors)} tensors: {', '.join(kinds)})",
        f"architecture: {header.metadata.get('general.architecture', '?')}",
        "heads: none are read from a .gguf file",
    ]
