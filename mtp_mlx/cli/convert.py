"""`mtp-mlx convert`: a checkpoint of another format -> an mlx-lm model folder; MTP heads -> an adapter folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mtp_mlx.cli import with_options
from mtp_mlx.cli.convert_options import ConvertOptions
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.convert.heads.families import Found
    from mtp_mlx.convert.read.checkpoint import Checkpoint

EPILOG = """\b
Examples:
  mtp-mlx convert model.Q8_0.gguf ./model
  mtp-mlx convert model.Q8_0.gguf ./model-4bit --quantize 4
  mtp-mlx convert ./MiMo-7B-RL ./mimo --quantize 4
  mtp-mlx convert ./Qwen3.5-0.8B --dry-run
  mtp-mlx convert ./Qwen3.5-0.8B ./heads --heads-only
  mtp-mlx convert ./mimo --verify
  mtp-mlx convert ./MiMo-7B-RL ./heads --heads-only --quantize-heads 8
  mtp-mlx convert ./heads ./speculators --heads-only --heads-as speculators
  mtp-mlx convert last.ckpt ./ptp --heads-only --base ./vicuna-7b
"""


@click.command(epilog=EPILOG, short_help="Convert a checkpoint to an mlx-lm model folder")
@click.argument("source")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--quantize", type=click.Choice(["4", "8"]), help="Quantise the weights to this many bits")
@click.option("--group-size", type=click.Choice(["32", "64"]), default="64", help="Quantisation group size")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the weights (default: the checkpoint's; for .gguf float32 on CPU, bfloat16 on Metal)",
)
@click.option(
    "--quantize-heads", type=click.Choice(["4", "8"]), help="Quantise the MTP heads to this many bits"
)
@click.option("--heads-only", is_flag=True, help="Write only the MTP heads, as an adapter folder")
@click.option("--trunk-only", is_flag=True, help="Leave the MTP heads out")
@click.option(
    "--heads-as",
    type=click.Choice(["adapter", "speculators"]),
    default="adapter",
    show_default=True,
    help="Layout that --heads-only writes",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing; OUT is not needed")
@click.option(
    "--head-norms",
    type=click.Choice(["auto", "plain", "zero-centred", "mixed"]),
    default="auto",
    show_default=True,
    help="How the file stores the heads' norms; mixed: around zero in their layers alone",
)
@click.option(
    "--head-order",
    type=click.Choice(["auto", "embedding", "hidden"]),
    default="auto",
    show_default=True,
    help="Which input the stored fuse weights act on first",
)
@click.option(
    "--head-hidden",
    type=click.Choice(["auto", "post-norm", "pre-norm"]),
    default="auto",
    show_default=True,
    help="Trunk state for the first draft: after or before the trunk's last norm",
)
@click.option(
    "--head-recycled",
    type=click.Choice(["auto", "normed", "raw", "trunk"]),
    default="auto",
    show_default=True,
    help="State passed to the next head: normed, raw or trunk",
)
@click.option("--base", metavar="MODEL", help="Base model, if SOURCE has none")
@click.option("--verify", is_flag=True, help="Measure acceptance and suggest conventions")
@click.option("--force", is_flag=True, help="Replace OUT if it is a folder of the same kind")
def command(source: str, out: Path | None, **options: Any) -> None:
    """Convert the checkpoint SOURCE to the model folder OUT.

    SOURCE is a folder, a .safetensors, .bin, .pt, .pth, .ckpt or .gguf file (the first part of a split one), or a hub
    id. Its MTP heads, if any, become the adapter folder OUT/mtp, which is used with the model unless you give
    --adapter none. With --heads-only OUT is an adapter folder with the heads alone. With --verify and no OUT, SOURCE
    is a folder converted before. PyTorch files are read without running the code in them.
    """
    how = ConvertOptions(**options)
    how.check(out)
    path = _local(source, how.dry_run)
    gguf = path.suffix.lower() == ".gguf" and not path.is_dir()
    if how.dry_run:
        click.echo(_in_options(_dry_run(path, gguf, how)))
    elif out is None and how.verify:
        click.echo(_in_options(_verify(path)))
    elif out is None:
        raise click.UsageError("Missing argument 'OUT' (only --dry-run and --verify do without).")
    elif gguf:
        click.echo(_convert_gguf(path, out, how))
    elif how.heads_only and (path / "mtp_config.json").is_file():
        click.echo(_export(path, out, how))
    elif how.heads_only:
        click.echo(_convert_heads(path, out, how))
    else:
        click.echo(_convert_whole(path, out, how))


def _local(source: str, dry_run: bool) -> Path:
    from mtp_mlx.convert.read.checkpoint import is_hub_id, local_source

    if not is_hub_id(source):
        return local_source(source)
    if dry_run:
        raise MTPError(
            f"{source}: --dry-run reads local files only and downloads nothing; download the checkpoint first"
        )
    with Console(stderr=True).status(f"downloading {source}"):
        return local_source(source)


def _in_options(lines: list[str]) -> str:
    """The library's lines as one text, with options in place of arguments."""
    return with_options("\n".join(lines), command)


def _dry_run(source: Path, gguf: bool, how: ConvertOptions) -> list[str]:
    """Lines about what the conversion would do."""
    from mtp_mlx.convert.dry_run import checkpoint_lines, gguf_lines
    from mtp_mlx.convert.read.checkpoint import open_checkpoint

    if gguf:
        return gguf_lines(source)
    return checkpoint_lines(
        open_checkpoint(source), heads=not how.trunk_only, trunk=not how.heads_only, overrides=how.overrides
    )


# --- models -------------------------------------------------------------------------------------------------


def _convert_gguf(source: Path, out: Path, how: ConvertOptions) -> Path:
    from mtp_mlx.convert.gguf.model import convert_gguf

    if how.heads_only:
        raise MTPError(f"{source}: MTP heads are not read from .gguf files; use the original checkpoint")
    if how.of_heads:
        raise MTPError(
            f"{source}: MTP heads are not read from .gguf files; leave {' and '.join(how.of_heads)} out"
        )
    with Console(stderr=True).status(f"converting {source.name}") as status:
        return convert_gguf(
            source,
            out,
            dtype=how.dtype,
            quantize=how.bits,
            group_size=int(how.group_size),
            force=how.force,
            progress=lambda stage: status.update(f"{source.name}: {stage}"),
        )


def _convert_whole(source: Path, out: Path, how: ConvertOptions) -> Path:
    """Converts a checkpoint and reports about it on stderr."""
    from mtp_mlx.convert.adapters.ptp_plan import is_ptp_checkpoint
    from mtp_mlx.convert.heads.plan import heads_beside_trunk
    from mtp_mlx.convert.read.checkpoint import open_checkpoint
    from mtp_mlx.convert.whole import WholeSettings, convert_whole, report_lines

    checkpoint = open_checkpoint(source)
    if is_ptp_checkpoint(checkpoint):
        raise MTPError(
            f"{source}: a student of Parallel Token Prediction becomes an adapter of its base model: give "
            "--heads-only, and the model's folder with --base"
        )
    found = heads_beside_trunk(checkpoint, wanted=not how.trunk_only)
    how.check_heads(checkpoint, found)
    settings = WholeSettings(
        dtype=how.dtype,
        quantize=how.bits,
        group_size=int(how.group_size),
        quantize_heads=how.head_bits,
        overrides=how.overrides,
        heads=not how.trunk_only,
        force=how.force,
    )
    with Console(stderr=True).status(f"converting {source.name}") as status:
        result = convert_whole(
            checkpoint, found, out, settings, lambda stage: status.update(f"{source.name}: {stage}")
        )
    for line in report_lines(result):
        click.echo(line, err=True)
    if how.verify:
        click.echo(_in_options(_verify(out)), err=True)
    return result.folder


def _verify(folder: Path) -> list[str]:
    """Lines about the heads beside a converted model, measured with it."""
    from mtp_mlx.adapter_folder import sidecar
    from mtp_mlx.base_model import load_base

    heads = sidecar(folder)
    if heads is None:
        raise MTPError(
            f"{folder}: there are no converted heads to verify (no mtp/mtp_config.json); convert a checkpoint with "
            "MTP heads first, and give the folder it was converted to"
        )
    return _measured(*load_base(folder), heads)


def _measured(model: Any, tokenizer: Any, heads: Path) -> list[str]:
    from mtp_mlx.api import chat_prompt
    from mtp_mlx.convert.heads.verify import PROMPTS, verify_folder

    prompts = [chat_prompt(tokenizer, text) for text in PROMPTS]
    with Console(stderr=True).status(f"verifying {heads}"):
        return verify_folder(model, tokenizer, heads, prompts).lines()


# --- heads and adapters alone -------------------------------------------------------------------------------


def _convert_heads(source: Path, out: Path, how: ConvertOptions) -> Path:
    """Converts heads, or an adapter of another program, into an adapter folder."""
    from mtp_mlx.adapter_folder import sidecar
    from mtp_mlx.convert.adapters.peft_plan import is_peft
    from mtp_mlx.convert.adapters.ptp_plan import is_ptp_checkpoint
    from mtp_mlx.convert.heads.plan import find_heads, plan_heads
    from mtp_mlx.convert.heads.speculators import write_speculators
    from mtp_mlx.convert.read.checkpoint import open_checkpoint

    with Console(stderr=True).status(f"reading {source.name}") as status:
        checkpoint = open_checkpoint(source)
        if is_ptp_checkpoint(checkpoint):
            return _convert_ptp(checkpoint, out, how)
        if is_peft(checkpoint):
            return _convert_peft(checkpoint, out, how)
        if sidecar(source) is not None:
            how.check_converted(source)
        found = find_heads(checkpoint)
        how.check_heads(checkpoint, found)
        if how.heads_as == "speculators":
            plan = plan_heads(checkpoint, found, how.overrides)
            return write_speculators(checkpoint, plan, out, base_name=how.base or "", force=how.force)
        return _write_heads(checkpoint, found, out, how, status.update)


def _write_heads(
    checkpoint: Checkpoint,
    found: Found | None,
    out: Path,
    how: ConvertOptions,
    progress: Callable[[str], None],
) -> Path:
    """Writes an adapter folder of heads for --base, or for the trunk beside them."""
    from mtp_mlx.base_model import load_base
    from mtp_mlx.convert.heads.write import Base, trunk_name
    from mtp_mlx.convert.heads_only import convert_heads
    from mtp_mlx.convert.whole import open_base

    with ExitStack() as stack:
        model, tokenizer, base = None, None, None
        if how.base:
            model, tokenizer = load_base(how.base)
            base = Base.of(Path(how.base).name, model)
        elif how.verify:
            model, tokenizer = stack.enter_context(open_base(checkpoint, found))
            base = Base.of(trunk_name(checkpoint), model)
        folder = convert_heads(
            checkpoint,
            found,
            out,
            overrides=how.overrides,
            base=base,
            quantize=how.head_bits,
            force=how.force,
            progress=progress,
        )
        if how.verify:
            click.echo(_in_options(_measured(model, tokenizer, folder)), err=True)
    return folder


def _export(source: Path, out: Path, how: ConvertOptions) -> Path:
    """Writes the heads of an adapter folder in the speculators layout."""
    from mtp_mlx.convert.heads.speculators import export_speculators
    from mtp_mlx.models import resolve_model

    if how.heads_as != "speculators":
        raise MTPError(
            f"{source} is an adapter folder already; --heads-as speculators converts it to that layout"
        )
    how.check_converted(source)
    config = None
    if how.base:
        path = Path(resolve_model(how.base)) / "config.json"
        if not path.is_file():
            raise MTPError(f"{how.base}: for this, --base must be a local model folder with a config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
    return export_speculators(source, out, base_name=how.base or "", base=config, force=how.force)


def _convert_peft(checkpoint: Checkpoint, out: Path, how: ConvertOptions) -> Path:
    from mtp_mlx.base_model import load_base
    from mtp_mlx.convert.adapters.peft import write_peft

    how.check_no_heads(f"{checkpoint.path}: it is a PEFT adapter and has no MTP heads")
    named = checkpoint.config.get("base_model_name_or_path")
    name = how.base or (named if isinstance(named, str) and Path(named).is_dir() else None)
    if name is None:
        raise MTPError(
            f"{checkpoint.path}: a PEFT adapter needs its base model: give the model's folder with --base"
        )
    return write_peft(checkpoint, load_base(name)[0], Path(name).name, out, force=how.force)


def _convert_ptp(checkpoint: Checkpoint, out: Path, how: ConvertOptions) -> Path:
    from mtp_mlx.base_model import load_base
    from mtp_mlx.convert.adapters.ptp import write_ptp

    if how.base is None:
        raise MTPError(
            f"{checkpoint.path}: a student of Parallel Token Prediction needs its base model: give the model's "
            "folder with --base"
        )
    how.check_no_heads(f"{checkpoint.path}: it has slots of Parallel Token Prediction, no MTP heads")
    return write_ptp(checkpoint, load_base(how.base)[0], Path(how.base).name, out, force=how.force)
