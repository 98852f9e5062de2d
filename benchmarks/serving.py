"""Measure the throughput of the server's engine: requests one by one, in turns, and in shared passes.

    python benchmarks/serving.py --clients 4 --max-tokens 48 --layout plain --layout linear

Speeds are all tokens over all seconds, and "relative to one by one" is the ratio of these totals. The prompts are the
same in all runs, so the texts should be too; the last column counts those that differ (near-ties).
"""

from __future__ import annotations

import queue
import time
from typing import Any

import click

from mtp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported, which otherwise uses a BLAS of its own, many times slower

from mtp_mlx.api import chat_prompt, load  # noqa: E402
from mtp_mlx.measure.prompts import BUILT_IN  # noqa: E402
from mtp_mlx.planning.calibrate import step_cost  # noqa: E402
from mtp_mlx.serve.engine import Engine, EngineSettings  # noqa: E402
from mtp_mlx.serve.request import Event, Failure, GenerationRequest  # noqa: E402
from mtp_mlx.serve.sequence import DecodeSettings  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "one by one": {"concurrent": 1},
    "in turns": {"batch": False},
    "in shared passes": {},
}


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--adapter", default="auto", show_default=True)
@click.option("--clients", default=4, show_default=True)
@click.option("--max-tokens", default=48, show_default=True)
@click.option("--layout", "layouts", multiple=True, default=("plain", "linear", "auto"), show_default=True)
@click.option("--drafts", type=int, default=None, help="Drafts per step of fixed layouts")
def main(
    model: str, adapter: str, clients: int, max_tokens: int, layouts: tuple[Any, ...], drafts: int | None
) -> None:
    """Print a Markdown table."""
    loaded, tokenizer = load(model, adapter)
    if "auto" in layouts:
        step_cost(loaded)
    prompts = [chat_prompt(tokenizer, prompt.text) for prompt in BUILT_IN[:clients]]
    requests = [GenerationRequest(prompt, max_tokens) for prompt in prompts]
    click.echo(
        "| layout | requests are | tokens/s | relative to one by one | tokens per step | differing texts |\n"
        "|---|---|---|---|---|---|"
    )
    for layout in layouts:
        decode = DecodeSettings(layout=layout, drafts=None if layout in ("plain", "auto") else drafts)
        first: tuple[float, list[str]] | None = None
        for way, settings in WAYS.items():
            engine = Engine(
                loaded,
                tokenizer,
                EngineSettings(
                    **{"queue": clients, "concurrent": clients, "prefix_cache_bytes": 0} | settings,
                    decode=decode,
                ),
            )
            seconds, tokens, steps, texts = run(engine, requests)
            speed = tokens / seconds
            first = first or (speed, texts)
            other = sum(one != two for one, two in zip(texts, first[1], strict=True))
            click.echo(
                f"| {layout} | {way} | {speed:.1f} | {speed / first[0]:.2f} | {tokens / steps:.2f} | {other} |"
            )


def run(engine: Engine, requests: list[GenerationRequest]) -> tuple[float, int, float, list[str]]:
    """Seconds, tokens, steps of all sequences, and the texts, measured after a warm-up request."""
    engine.start()
    try:
        answer(engine, [GenerationRequest(requests[0].prompt, 4)])
        before = engine.metrics.value("mtp_mlx_steps_total")
        started = time.perf_counter()
        texts, tokens = answer(engine, requests)
        seconds = time.perf_counter() - started
        return seconds, tokens, engine.metrics.value("mtp_mlx_steps_total") - before, texts
    finally:
        engine.stop()


def answer(engine: Engine, requests: list[GenerationRequest]) -> tuple[list[str], int]:
    """The texts of requests sent at the same time, and how many tokens they have in all."""
    queues: list[queue.Queue[Event]] = [queue.Queue() for _ in requests]
    for request, events in zip(requests, queues, strict=True):
        engine.submit(request, events.put)
    texts, tokens = [], 0
    for events in queues:
        text, summary = "", None
        while summary is None:
            event = events.get()
            if isinstance(event, Failure):
                raise event.error
            text, summary = text + event.text, event.summary
        texts.append(text)
        tokens += summary.generation_tokens
    return texts, tokens


if __name__ == "__main__":
    main()
