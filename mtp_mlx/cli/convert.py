"""`mtp-mlx convert`: a checkpoint of another format -> an mlx-lm model folder."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from mtp_mlx.errors import ConversionError

EPILOG = """\b
Examples:
  mtp-mlx convert model.Q8_0.gguf ./model
  mtp-mlx convert model.Q8_0.gguf ./model-4bit --quantize 4
"""


@click.command(epilog=EPILOG, short_help="Convert a checkpoint to an mlx-lm model folder")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--quantize", type=click.Choice(["4", "8"]), help="Quantise the weights to this many bits")
@click.option(
    "--group-size", type=click.Choice(["32", "64"]), default="64", help="Weights that share a scale"
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the weights (default: float32 on CPU, bfloat16 on Metal)",
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a model folder already")
def command(
    source: Path, out: Path, quantize: str | None, group_size: str, dtype: str | None, force: bool
) -> None:
    """Convert SOURCE, a .gguf file of a llama- or qwen2-type model, into the mlx-lm model folder OUT."""
    if source.exists() and (source.is_dir() or source.suffix.lower() != ".gguf"):
        raise ConversionError(f"{source}: only .gguf files can be converted.")
    from mtp_mlx.convert.gguf import convert_gguf

    with Console(stderr=True).status(f"converting {source.name}") as status:
        folder = convert_gguf(
            source,
            out,
            dtype=dtype,
            quantize=int(quantize) if quantize else None,
            group_size=int(group_size),
            force=force,
            progress=lambda stage: status.update(f"{source.name}: {stage}"),
        )
    click.echo(folder)
