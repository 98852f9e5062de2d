"""`mtp-mlx convert`: a checkpoint of another format -> an mlx-lm model folder, or its MTP heads -> an adapter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mtp_mlx.cli.convert_options import ConvertOptions
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.convert.read.checkpoint import Checkpoint

EPILOG = """\b
Examples:
  mtp-mlx convert model.Q8_0.gguf ./model
  mtp-mlx convert model.Q8_0.gguf ./model-4bit --quantize 4
  mtp-mlx convert ./MiMo-7B-RL ./mimo --quantize 4
  mtp-mlx convert ./Qwen3.5-0.8B --dry-run
  mtp-mlx convert ./Qwen3.5-0.8B ./heads --heads-only
  mtp-mlx convert ./mimo --verify
  mtp-mlx convert ./heads ./speculators --heads-only --heads-as speculators
  mtp-mlx convert last.ckpt ./ptp --heads-only --base ./vicuna-7b
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
@click.option(
    "--head-order",
    type=click.Choice(["auto", "embedding", "hidden"]),
    default="auto",
    show_default=True,
    help="Which half the heads' fuse weights begin with in the file",
)
@click.option(
    "--head-hidden",
    type=click.Choice(["auto", "post-norm", "pre-norm"]),
    default="auto",
    show_default=True,
    help="Which state of the trunk the heads were trained on",
)
@click.option(
    "--head-recycled",
    type=click.Choice(["auto", "normed", "raw", "trunk"]),
    default="auto",
    show_default=True,
    help="Which state the next draft takes: a head's after its norm, or before, or the trunk's",
)
@click.option("--base", metavar="MODEL", help="Base of heads, or of a PEFT adapter, that come without it")
@click.option(
    "--verify", is_flag=True, help="Measure what the heads' drafts are worth, under which convention"
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a folder of the same kind already")
def command(source: str, out: Path | None, **options: Any) -> None:
    """Convert SOURCE into the model folder OUT.

    SOURCE is a checkpoint: a folder, a .safetensors, .bin, .pt, .pth, .ckpt or .gguf file, or a hub id. Its MTP
    heads, if it has any, become the adapter folder OUT/mtp, which is used with the model unless --adapter none is
    given. PyTorch files are read without running the code in them. With --heads-only OUT is an adapter folder. With
    --verify and without OUT, SOURCE is a model folder that was converted before.
    """
    how = ConvertOptions(**options)
    how.check(out)
    path = _local(source, how.dry_run)
    gguf = path.suffix.lower() == ".gguf" and not path.is_dir()
    if how.dry_run:
        click.echo("\n".join(_gguf_lines(path) if gguf else _plan_lines(path, how)))
    elif out is None and how.verify:
        click.echo(verify(path), nl=False)
    elif out is None:
        raise click.UsageError("Missing argument 'OUT' (only --dry-run and --verify do without).")
    elif how.heads_only:
        click.echo(convert_heads(path, out, how))
    elif gguf:
        click.echo(convert_gguf(path, out, how))
    else:
        click.echo(convert_whole(path, out, how))


def _local(source: str, dry_run: bool) -> Path:
    from mtp_mlx.convert.read.checkpoint import is_hub_id, local_source

    if not is_hub_id(source):
        return local_source(source)
    if dry_run:
        raise MTPError(
            f"{source}: --dry-run reads local files and downloads nothing; download the checkpoint first"
        )
    with Console(stderr=True).status(f"getting {source} from the hub"):
        return local_source(source)


# --- models -------------------------------------------------------------------------------------------------


def convert_gguf(source: Path, out: Path, how: ConvertOptions) -> Path:
    """Converts a .gguf file."""
    from mtp_mlx.convert.gguf.model import convert_gguf

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


def convert_whole(source: Path, out: Path, how: ConvertOptions) -> Path:
    """Converts a checkpoint; what there is to say about it goes to stderr."""
    from mtp_mlx.convert.adapters.ptp import is_ptp_checkpoint
    from mtp_mlx.convert.read.checkpoint import open_checkpoint
    from mtp_mlx.convert.whole import WholeSettings, convert_whole, report_lines

    checkpoint = open_checkpoint(source)
    if is_ptp_checkpoint(checkpoint):
        raise MTPError(
            f"{source}: a student of Parallel Token Prediction becomes an adapter of its base model: give "
            "--heads-only, and that model's folder with --base"
        )
    how.check_heads(checkpoint)
    settings = WholeSettings(
        dtype=how.dtype,
        quantize=how.bits,
        group_size=int(how.group_size),
        head_norms=how.head_norms,
        head_order=how.head_order,
        head_hidden=how.head_hidden,
        head_recycled=how.head_recycled,
        heads=not how.trunk_only,
        force=how.force,
    )
    with Console(stderr=True).status(f"converting {source.name}") as status:
        result = convert_whole(source, out, settings, lambda stage: status.update(f"{source.name}: {stage}"))
    for line in report_lines(result):
        click.echo(line, err=True)
    if how.verify:
        click.echo(verify(out), nl=False, err=True)
    return result.folder


def verify(folder: Path) -> str:
    """Lines about the heads beside a converted model, measured with it."""
    from mtp_mlx.sidecar import sidecar

    heads = sidecar(folder)
    if heads is None:
        raise MTPError(
            f"{folder}: there are no converted heads to verify (no mtp/mtp_config.json); convert a checkpoint that "
            "has MTP heads first, and give the folder it was converted to"
        )
    return _verified(*_base(str(folder)), heads)


def _verified(model: Any, tokenizer: Any, heads: Path) -> str:
    from mtp_mlx.convert.heads.verify import verify_folder

    with Console(stderr=True).status(f"verifying {heads}"):
        lines = verify_folder(model, tokenizer, heads).lines()
    return "".join(f"{line}\n" for line in lines)


def _base(name: str) -> tuple[Any, Any]:
    """A bare model and its tokenizer."""
    import mlx_lm

    from mtp_mlx.models import resolve_model

    path = resolve_model(name)
    try:
        return mlx_lm.load(str(path))[:2]
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise MTPError(f"the model {name} could not be loaded: {' '.join(str(error).split())}") from error


# --- heads and adapters alone -------------------------------------------------------------------------------


def convert_heads(source: Path, out: Path, how: ConvertOptions) -> Path:
    """Converts heads, or a PEFT adapter, into a folder of their own."""
    if source.suffix.lower() == ".gguf" and source.is_file():
        raise MTPError(f"{source}: MTP heads are not read from .gguf files; use the original checkpoint")
    from mtp_mlx.convert.adapters.peft import is_peft
    from mtp_mlx.convert.adapters.ptp import is_ptp_checkpoint
    from mtp_mlx.convert.heads.speculators import write_speculators
    from mtp_mlx.convert.read.checkpoint import open_checkpoint

    if (source / "mtp_config.json").is_file():
        return _export(source, out, how)
    with Console(stderr=True).status(f"reading {source.name}") as status:
        checkpoint = open_checkpoint(source)
        if is_ptp_checkpoint(checkpoint):
            return _convert_ptp(checkpoint, out, how)
        if is_peft(checkpoint):
            return _convert_peft(checkpoint, out, how)
        how.check_heads(checkpoint)
        if how.heads_as == "speculators":
            return write_speculators(
                checkpoint, out, base=how.base or "", plan=how.plan(checkpoint), force=how.force
            )
        return _write_heads(checkpoint, out, how, status.update)


def _write_heads(
    checkpoint: Checkpoint, out: Path, how: ConvertOptions, progress: Callable[[str], None]
) -> Path:
    """An adapter folder of heads, for the base that is named or for the trunk beside them."""
    from mtp_mlx.convert.heads.write import write_heads
    from mtp_mlx.convert.whole import open_base

    with ExitStack() as stack:
        model, tokenizer = None, None
        if how.base:
            model, tokenizer = _base(how.base)
        elif how.verify:
            model, tokenizer = stack.enter_context(open_base(checkpoint))
        name = Path(how.base).name if how.base else None
        plan = how.plan(checkpoint)
        folder = write_heads(
            checkpoint, plan, out, base=model, base_name=name, force=how.force, progress=progress
        )
        if how.verify:
            click.echo(_verified(model, tokenizer, folder), nl=False, err=True)
    return folder


def _export(source: Path, out: Path, how: ConvertOptions) -> Path:
    """An adapter folder of heads in the speculators layout."""
    import json

    from mtp_mlx.convert.heads.speculators import export_speculators
    from mtp_mlx.models import resolve_model

    if how.heads_as != "speculators":
        raise MTPError(
            f"{source} is an adapter folder already; --heads-as speculators writes it in that layout"
        )
    if how.of_heads:
        raise MTPError(
            f"{source}: its heads were converted before, so {how.of_heads[0]} comes too late; convert the original "
            "checkpoint"
        )
    config = None
    if how.base:
        path = Path(resolve_model(how.base)) / "config.json"
        if not path.is_file():
            raise MTPError(f"{how.base}: --base must be a local model folder here, whose config.json is read")
        config = json.loads(path.read_text(encoding="utf-8"))
    return export_speculators(source, out, base=how.base or "", base_config=config, force=how.force)


def _convert_peft(checkpoint: Checkpoint, out: Path, how: ConvertOptions) -> Path:
    from mtp_mlx.convert.adapters.peft import write_peft

    if how.of_heads or how.heads_as != "adapter":
        raise MTPError(
            f"{checkpoint.path}: it is a PEFT adapter and has no MTP heads: leave --verify, --heads-as and "
            "--head-... out"
        )
    named = checkpoint.config.get("base_model_name_or_path")
    name = how.base or (named if isinstance(named, str) and Path(named).is_dir() else None)
    if name is None:
        raise MTPError(
            f"{checkpoint.path}: a PEFT adapter becomes an adapter of a base model: name that model's folder "
            "with --base"
        )
    return write_peft(checkpoint, _base(name)[0], Path(name).name, out, force=how.force)


def _convert_ptp(checkpoint: Checkpoint, out: Path, how: ConvertOptions) -> Path:
    from mtp_mlx.convert.adapters.ptp import convert_ptp
    from mtp_mlx.models import resolve_model

    if how.base is None:
        raise MTPError(
            f"{checkpoint.path}: a student of Parallel Token Prediction becomes an adapter of its base model: name "
            "that model's folder with --base"
        )
    if how.of_heads or how.heads_as != "adapter":
        raise MTPError(
            f"{checkpoint.path}: it has slots of Parallel Token Prediction, no MTP heads: leave --verify, --heads-as "
            "and --head-... out"
        )
    return convert_ptp(checkpoint.path, resolve_model(how.base), out, force=how.force)


# --- plans --------------------------------------------------------------------------------------------------


def _plan_lines(source: Path, how: ConvertOptions) -> list[str]:
    """The plan of a checkpoint's heads and of its trunk; without heads, what the checkpoint is."""
    from mtp_mlx.convert.adapters.peft import is_peft
    from mtp_mlx.convert.adapters.peft import plan_lines as peft_lines
    from mtp_mlx.convert.adapters.ptp import is_ptp_checkpoint, student_line
    from mtp_mlx.convert.heads.plan import find_heads
    from mtp_mlx.convert.heads.report import plan_lines, source_line
    from mtp_mlx.convert.read.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source)
    if is_ptp_checkpoint(checkpoint):
        return [source_line(checkpoint), student_line(checkpoint)]
    if is_peft(checkpoint):
        return peft_lines(checkpoint)
    found = None if how.trunk_only else find_heads(checkpoint)
    if how.heads_only or found is not None:
        lines = plan_lines(checkpoint, how.plan(checkpoint))
    else:
        kind = checkpoint.text_config.get("model_type", "?")
        lines = [source_line(checkpoint), f"model type: {kind}", "heads: none"]
    if not how.heads_only:
        count = len(checkpoint.tensors.keys() - (set() if found is None else found.owned))
        lines.append(
            f"trunk: {count} tensors, "
            + ("through mlx-lm" if count else "so only --heads-only can convert it")
        )
    return lines


def _gguf_lines(source: Path) -> list[str]:
    from mtp_mlx.convert.gguf.file import read_gguf

    header = read_gguf(source)
    kinds = sorted({info.type_name for info in header.tensors.values()})
    return [
        f"source: {source} (gguf, {len(header.tensors)} tensors: {', '.join(kinds)})",
        f"architecture: {header.metadata.get('general.architecture', '?')}",
        "heads: none are read from a .gguf file",
    ]
