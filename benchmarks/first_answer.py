"""Time to the first token, ours and mlx-lm's, with an empty cache (step costs are measured first) and a filled one.

    python benchmarks/first_answer.py --quantize 0 --quantize 4 --prompt-tokens 32 --prompt-tokens 2048

The model is loaded already; each prompt runs once, as it does for someone who has just started.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any
from unittest import mock

import click

from mtp_mlx.blas import prefer_openblas

TEXT = "The harbour was quiet in the morning, and the boats that had come in at night lay along the wall. "


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--quantize", "bits", multiple=True, type=int, default=(0, 4), show_default=True, help="0: not")
@click.option("--prompt-tokens", "lengths", multiple=True, default=(32, 2048), show_default=True)
@click.option("--max-tokens", default=64, show_default=True, help="Of which only the first is waited for")
def main(model: str, bits: tuple[int, ...], lengths: tuple[int, ...], max_tokens: int) -> None:
    """Print a Markdown table."""
    prefer_openblas()  # before mlx is imported, which otherwise uses a BLAS of its own, many times slower
    import mlx.core as mx
    import mlx_lm

    from mtp_mlx.api import load, stream_generate
    from mtp_mlx.models import bundled_adapter, resolve_model

    click.echo(
        "| bits | prompt tokens | mlx-lm, s | ours, cold cache, s | ours, warm cache, s | cold minus mlx-lm, s |\n"
        "|---|---|---|---|---|---|"
    )
    for width in bits:
        path = str(resolve_model(model, width or None))
        plain, tokenizer = mlx_lm.load(path)[:2]
        mx.eval(plain.parameters())
        ours, _ = load(path, bundled_adapter(model))
        for length in lengths:
            prompt = (tokenizer.encode(TEXT) * (length // 8 + 1))[:length]
            theirs = _first_token(mlx_lm.stream_generate(plain, tokenizer, prompt, max_tokens))
            with tempfile.TemporaryDirectory() as folder:
                with mock.patch.dict(os.environ, {"MTP_MLX_CACHE": folder}):
                    cold, warm = (
                        _first_token(stream_generate(ours, tokenizer, prompt, max_tokens)) for _ in range(2)
                    )
            click.echo(
                f"| {width or 'none'} | {length} | {theirs:.2f} | {cold:.2f} | {warm:.2f} | {cold - theirs:+.2f} |"
            )


def _first_token(responses: Any) -> float:
    """Seconds until the first response."""
    started = time.perf_counter()
    next(responses)
    seconds = time.perf_counter() - started
    responses.close()
    return seconds


if __name__ == "__main__":
    main()
