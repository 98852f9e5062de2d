"""`mtp-mlx cache-prompt`: reads a text once and keeps what the model made of it, for many prompts behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from mtp_mlx.cli.options import CacheOptions
from mtp_mlx.config import from_yaml, options_for, setting, trust_setting
from mtp_mlx.errors import MTPError

EPILOG = """\b
Examples:
  mtp-mlx cache-prompt --prompt-file report.txt --out report.safetensors
  mtp-mlx generate --prompt-cache-file report.safetensors --prompt "Summarise this."
"""


@dataclass(frozen=True)
class OutOption:
    """Where to write."""

    out: Path = setting(
        help="File to write, .safetensors", flag="-o", old_option="--prompt-cache-file"
    )  # as mlx-lm calls it


@dataclass(frozen=True)
class CachePromptSettings(CacheOptions, OutOption):
    """Options of `mtp-mlx cache-prompt`."""

    model: str = setting("smollm2-135m", help="Embedded model, mlx-lm folder or hub id", flag="-m")
    adapter_path: str | None = setting(None, help="Fine-tune of mlx_lm.lora to put on the model")
    max_kv_size: int | None = setting(
        None, help="Most tokens in the KV cache: the first 4 stay, then the last ones", minimum=5
    )
    trust_remote_code: bool = trust_setting()
    quantize: Literal[4, 8] | None = setting(None, help="Quantise the embedded model to this many bits")
    prompt: str | None = setting(None, help="Text, or - for stdin", flag="-p")
    prompt_file: Path | None = setting(None, help="Read the text from this file", flag="-f")
    system: str | None = setting(None, help="System message", old_option="--system-prompt")


@click.command(epilog=EPILOG, short_help="Read a long text once, to ask about it later")
@options_for(CachePromptSettings)
@click.option("--raw", "--ignore-chat-template", "raw", is_flag=True, help="Use the text as it is")
def command(raw: bool, **options: Any) -> None:
    """Read a text and keep the KV cache in a file, which mlx-lm reads too.

    With a chat template, the text is the beginning of a user's message; a prompt of `generate --prompt-cache-file`
    is the rest of it.
    """
    from mtp_mlx import lora, prompt_cache
    from mtp_mlx.api import encode_prompt
    from mtp_mlx.base_model import load_base
    from mtp_mlx.chat_template import open_ids
    from mtp_mlx.cli.generate import read_prompt
    from mtp_mlx.cli.progress import prompt_progress
    from mtp_mlx.model.keeping_cache import UNLIMITED

    settings = from_yaml(CachePromptSettings, None, options)
    if settings.out.suffix != ".safetensors":
        raise MTPError(f"--out {settings.out} must end in .safetensors")
    if settings.max_kv_size is not None and settings.kv_bits is not None:
        raise MTPError("a cache of --max-kv-size cannot be quantised: leave --kv-bits or --max-kv-size out")
    text = read_prompt(settings, raw)
    model, tokenizer = load_base(
        settings.model, settings.quantize, trust_remote_code=settings.trust_remote_code
    )
    if settings.adapter_path is not None:
        lora.put_on(model, settings.adapter_path)
    plain = raw or not tokenizer.has_chat_template
    ids = encode_prompt(tokenizer, text) if plain else open_ids(tokenizer, text, settings.system)
    if settings.max_kv_size is not None and hasattr(model, "make_cache"):
        click.echo(f"note: {UNLIMITED}", err=True)
    cache = _cache_of(model, ids, settings, prompt_progress())
    prompt_cache.write(settings.out, cache, prompt_cache.Described(ids, settings.model))
    size = settings.out.stat().st_size
    click.echo(f"{len(ids):,} tokens -> {settings.out}, {size / 1e6:.1f} MB", err=True)


def _cache_of(model: Any, ids: list[int], settings: CachePromptSettings, progress: Any) -> list[Any]:
    """The KV cache of a text."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model, settings.max_kv_size)
    steps = generate_step(
        mx.array(ids),
        model,
        max_tokens=0,
        prompt_cache=cache,
        kv_bits=settings.kv_bits,
        kv_group_size=settings.kv_group_size,
        quantized_kv_start=settings.quantized_kv_start,
        prompt_progress_callback=progress,
    )
    for _ in steps:
        pass
    return cache
