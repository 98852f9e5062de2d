"""What `mtp-mlx generate` reports: the line of statistics, the JSON object, bar charts and colours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from mtp_mlx.config import to_dict

if TYPE_CHECKING:
    from mtp_mlx.answer_parts import Parts
    from mtp_mlx.api import GenerationResponse
    from mtp_mlx.cli.options import GenerateSettings
    from mtp_mlx.decode.emission import Emission
    from mtp_mlx.decode.pick import SamplingConfig
    from mtp_mlx.decode.stats import DecodeStats

# 256-colour codes of depths 1, 2, ...; the last is for all deeper ones
TINTS = (76, 39, 213, 208, 196, 226, 51, 141)
BAR_WIDTH = 30


@dataclass
class Run:
    """The result of one generation.

    Attributes:
        stats: counts of the decoding loop.
        sampling: how tokens were picked.
        most_drafts: most drafts per step of the model's own drafter; 0 without one.
        tokens: ids, including the end-of-text id if it was written.
        last: the last response, or None before the first token.
        layout: the layout in use.
        plain_tok_per_s: remembered speed of plain decoding, or None.
        kernels: number of calls by kernel and implementation; empty if no kernel can run.
        parts: answer and thinking, told apart; None before the end.
    """

    stats: DecodeStats
    sampling: SamplingConfig
    most_drafts: int
    plain_tok_per_s: float | None
    layout: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    last: GenerationResponse | None = None
    interrupted: bool = False
    kernels: dict[str, int] = field(default_factory=dict)
    parts: Parts | None = None

    @property
    def tok_per_s(self) -> float | None:
        """Tokens per second as mlx-lm counts them; None for fewer than two tokens."""
        return self.last.generation_tps if self.last and len(self.tokens) > 1 else None

    @property
    def prompt_s(self) -> float:
        """Seconds until the first token."""
        return self.last.prompt_tokens / self.last.prompt_tps if self.last else 0.0

    @property
    def acceptance(self) -> list[float | None]:
        """Acceptance by depth, up to the deepest draft that was checked."""
        known = list(self.stats.acceptance)
        while known and known[-1] is None:
            known.pop()
        return known

    @property
    def tokens_per_step(self) -> float:
        return len(self.tokens) / self.stats.steps if self.stats.steps else 0.0

    @property
    def speed_up(self) -> float | None:
        """Speed relative to the remembered plain speed, or None if either is unknown."""
        own, plain = self.tok_per_s, self.plain_tok_per_s
        return own / plain if own and plain else None


def report(settings: GenerateSettings, run: Run) -> dict[str, Any]:
    """The object that --json prints."""
    last, emission = run.last, emission_of(settings)
    return {
        "text": run.text,
        "answer": run.parts.text if run.parts else run.text,
        "thinking": run.parts.thinking if run.parts else "",
        "tokens": run.tokens,
        "prompt_tokens": last.prompt_tokens if last else None,
        "generation_tokens": len(run.tokens),
        "steps": run.stats.steps,
        "tokens_per_step": round(run.tokens_per_step, 4),
        "acceptance": [_rounded(value) for value in run.acceptance],
        "tok_per_s": _rounded(run.tok_per_s),
        "prompt_tok_per_s": _rounded(last.prompt_tps if last else None),
        "plain_tok_per_s": _rounded(run.plain_tok_per_s),
        "speed_up": None if run.layout == "plain" else _rounded(run.speed_up),
        "layout": run.layout,
        "emit": settings.emit,
        "tau": emission.threshold,
        "drafts": _drafts_in_use(settings, run),
        "slots": _drafts_in_use(settings, run),  # the old name of "drafts"
        "seed": settings.seed,
        "temperature": run.sampling.temperature,
        "lossless": emission.lossless,
        "finish_reason": "interrupted" if run.interrupted else last and last.finish_reason,
        "peak_memory_gb": _rounded(last.peak_memory if last else None),
        "model": settings.model,
        "adapter": settings.adapter,
        **({"heads": settings.heads} if settings.heads else {}),
        "settings": _sampling_and_cache(settings, run.sampling),
        "stats": run.stats.to_json(),
        "kernels": run.kernels,
    }


def _sampling_and_cache(settings: GenerateSettings, sampling: SamplingConfig) -> dict[str, Any]:
    """Every option that can change text or speed, except the prompt and those that `report` lists itself."""
    used = {name: getattr(sampling, name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
    named = ("prompt", "prompt_file", "model", "adapter", "layout", "emit", "tau", "drafts", "seed", "temp")
    return {key: value for key, value in (to_dict(settings) | used).items() if key not in named}


def statistics_line(settings: GenerateSettings, run: Run) -> str:
    """The line of statistics on stderr."""
    if run.last is None:
        return "Stopped before the first token."
    parts = [f"{len(run.tokens)} tok"]
    if run.tok_per_s:
        speed = f"{run.tok_per_s:.1f} tok/s"
        if run.speed_up and run.layout != "plain":
            speed += f" ({run.speed_up:.2f}x plain {run.plain_tok_per_s:.1f})"
        parts.append(speed)
    parts.append(f"{run.tokens_per_step:.2f} tok/step")
    if run.acceptance:
        parts.append("accept " + "/".join("-" if v is None else f"{v:.2f}" for v in run.acceptance))
    drafts = _drafts_in_use(settings, run)
    way = emission_of(settings).label(run.layout)
    parts.append(f"{way} {drafts}" if drafts else way)
    if run.stats.looped:
        parts[-1] += f" ({run.stats.looped})"
    for remark in (run.stats.tuned, run.stats.verdict):
        parts[-1] += f" ({remark})" if remark else ""
    if not emission_of(settings).lossless:
        parts.append("lossless: false")
    parts.append(f"prompt {run.last.prompt_tokens} tok {run.prompt_s:.1f} s")
    parts.append(f"peak {run.last.peak_memory:.1f} GB")
    return " · ".join(parts) + (" · stopped" if run.interrupted else "")


def emission_of(settings: GenerateSettings) -> Emission:
    """The emission of these settings."""
    from mtp_mlx.decode.emission import Emission  # imports mlx, which --help must not

    return Emission(settings.emit, settings.tau, settings.first_token_sampling)


def _drafts_in_use(settings: GenerateSettings, run: Run) -> int:
    if settings.drafter == "lookup":
        return settings.drafts or 0
    return 0 if run.layout == "plain" else settings.drafts or run.most_drafts


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def histograms(stats: DecodeStats) -> str:
    """Bar charts of tokens per step, of acceptance by depth and, with trees, of which choices were accepted."""
    lines = ["tokens per step"]
    lines += bars(
        (str(size), count / stats.steps, f"{count}") for size, count in sorted(stats.histogram.items())
    )
    reached = [(depth, n) for depth, n in enumerate(stats.submitted, start=1) if n]
    if reached:
        lines.append("acceptance by depth")
        for depth, n in reached:
            accepted = stats.accepted[depth - 1]
            lines += bars([(str(depth), accepted / n, f"{accepted} of {n}")])
    if set(stats.choices) - {1}:
        lines.append("accepted drafts by choice, 1 the likeliest of its place")
        total = stats.choices.total()
        lines += bars((str(choice), n / total, f"{n}") for choice, n in sorted(stats.choices.items()))
    return "\n".join(lines)


def bars(rows: Iterable[tuple[str, float, str]]) -> list[str]:
    """One bar per (label, share in [0, 1], remark), precise to an eighth of a character."""
    lines = []
    for label, share, remark in rows:
        eighths = round(share * BAR_WIDTH * 8)
        bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8].strip())
        lines.append(f"{label:>3} {bar:<{BAR_WIDTH}} {share:4.0%}  {remark}")
    return lines


def legend(drafts: int) -> str:
    """The colour of each depth up to `drafts`, and what is underlined."""
    tints = [click.style(f"draft {depth}", fg=tint(depth)) for depth in range(1, min(drafts, len(TINTS)) + 1)]
    return " · ".join(["model's own pick", *tints, "underlined: not the likeliest draft of its place"])


def styled(response: GenerationResponse, color: bool) -> str:
    """The text of a response: thinking is dimmed; accepted drafts are as in `legend` if `color`."""
    tinted = tint(response.depth) if color and response.from_draft else None
    if not response.text or (tinted is None and not response.thinking):
        return response.text
    second = color and response.choice > 1
    return click.style(response.text, fg=tinted, dim=response.thinking or None, underline=second or None)


def tint(depth: int) -> int:
    return TINTS[min(depth, len(TINTS)) - 1]
