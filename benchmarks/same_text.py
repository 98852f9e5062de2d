"""Count the texts that are the same with and without mtp-mlx, over prompts, layouts and temperatures.

At temperature 0 the reference is mlx-lm's own generation with the bare model; above it, this package's plain loop
with the same seed. A difference is accepted only with a near-tie certificate (see
`mtp_mlx/measure/certificate.py`), which exists only at temperature 0.

    python benchmarks/same_text.py --prompts prompts.jsonl --limit 40 --max-tokens 64
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from mtp_mlx.blas import prefer_openblas

LAYOUTS = ("auto", "quadratic", "linear", "plain")


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="Embedded model, folder or hub id")
@click.option("--adapter", default="auto", show_default=True, help="Adapter folder or 'auto'")
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL file of prompts")
@click.option("--limit", default=40, show_default=True, help="Number of prompts, spread over the file")
@click.option("--max-tokens", default=64, show_default=True, help="Tokens per prompt")
@click.option("--seed", default=7, show_default=True, help="Seed at temperature 0.8")
def main(model: str, adapter: str, prompts: Path | None, limit: int, max_tokens: int, seed: int) -> None:
    """Print a JSON object for every text that differs at temperature 0, and the counts at the end."""
    prefer_openblas()
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from mtp_mlx import SamplingConfig, chat_prompt, load
    from mtp_mlx.api import stream_generate
    from mtp_mlx.measure.certificate import compare
    from mtp_mlx.measure.prompts import read_prompts

    chosen = read_prompts(prompts, limit)
    attached, tokenizer = load(model, adapter)

    def ours(ids: list[int], layout: str, sampling: SamplingConfig) -> list[int]:
        stream = stream_generate(attached, tokenizer, ids, max_tokens, layout=layout, sampling=sampling)
        return [response.token for response in stream]

    counts: Counter[str] = Counter()
    for index, prompt in enumerate(chosen):
        ids = chat_prompt(tokenizer, prompt.text)
        reference = []
        with attached.unwrapped() as bare:
            for token, _ in generate_step(mx.array(ids), bare, max_tokens=max_tokens):
                reference.append(int(token))
                if reference[-1] in tokenizer.eos_token_ids:
                    break
        greedy, sampled = SamplingConfig(), SamplingConfig(temperature=0.8, seed=seed)
        sampled_reference = ours(ids, "plain", sampled)
        for layout in LAYOUTS:
            with_drafts = ours(ids, layout, greedy)
            with attached.unwrapped() as bare:
                comparison = compare(bare, ids, reference, with_drafts)
            kind = "same" if comparison.identical else "near-tie" if comparison.certified else "DIFFERENT"
            counts[f"temperature 0, {layout}: {kind}"] += 1
            if not comparison.identical:
                print(
                    json.dumps({"prompt": prompt.text[:60], "layout": layout, **vars(comparison)}), flush=True
                )
            if layout != "plain":
                same = ours(ids, layout, sampled) == sampled_reference
                counts[f"temperature 0.8, {layout}: {'same' if same else 'DIFFERENT'}"] += 1
        print(f"{index + 1}/{len(chosen)}", flush=True)
    print(
        json.dumps(
            {"prompts": len(chosen), "max_tokens": max_tokens, **dict(sorted(counts.items()))}, indent=2
        )
    )


if __name__ == "__main__":
    main()
