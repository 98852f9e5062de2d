"""Options that several verbs have, in blocks: a verb's settings inherit the blocks it has.

Fields of a later base class stand first, and those of the class itself last; so bases are written from the last block
of `--help` to the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtp_mlx.config import setting
from mtp_mlx.drafters import registry


@dataclass(frozen=True)
class ModelOptions:
    """Which model, with which adapter."""

    model: str = setting("smollm2-135m", help="Embedded model, mlx-lm folder or hub id", flag="-m")
    adapter: str = setting("auto", help="Adapter folder, 'auto' for the bundled one, or 'none'", flag="-a")


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are picked, as in mlx-lm."""

    temp: float = setting(0.0, help="Temperature, 0 for the likeliest token", minimum=0)
    top_k: int = setting(0, help="Sample from the k likeliest tokens, 0 for all", minimum=0)
    top_p: float = setting(1.0, help="Sample from the likeliest of this probability", minimum=0, maximum=1)
    min_p: float = setting(0.0, help="Least fraction of the top probability", minimum=0, maximum=1)
    repetition_penalty: float = setting(1.0, help="Penalty on repeated tokens, 1 for none", minimum=0)
    seed: int = setting(0, help="Seed of the noise", minimum=0)


DRAFTERS = f"Drafters, comma-separated: {', '.join(registry.drafter_names())}, lookup"


@dataclass(frozen=True)
class DraftingOptions:
    """Who drafts, how much, and how drafts lie in a pass."""

    layout: Literal["auto", "linear", "quadratic", "plain"] = setting("auto", help="Layout of a step")
    drafts: int | None = setting(None, help="Drafts per step", minimum=1, old_option="--slots")
    lookup: bool | None = setting(None, help="Draft from the text itself too (default: in auto)")
    drafter: str | None = setting(None, help=DRAFTERS)


# What single drafters take when a model is loaded, as their rooms say.
LoadingOptions: Any = registry.loading_block()


@dataclass(frozen=True)
class EmissionOptions:
    """Whether drafts are verified before they are written."""

    emit: Literal["verified", "conf-adapt", "static"] = setting(
        "verified", help="Drafts: verified, or unverified (lossy)"
    )
    tau: float | None = setting(None, help="Least probability of a draft (conf-adapt: 0.9)")


@dataclass(frozen=True)
class CacheOptions:
    """How keys and values are kept."""

    kv_bits: Literal[2, 3, 4, 6, 8] | None = setting(None, help="Bits of the KV cache")
    kv_group_size: Literal[32, 64, 128] = setting(64, help="Values that share a scale in the KV cache")
    quantized_kv_start: int = setting(5000, help="Tokens before the KV cache is quantised", minimum=0)


@dataclass(frozen=True)
class PrecisionOptions:
    """How exactly the model computes."""

    quantize: Literal[4, 8] | None = setting(None, help="Bits of the weights, embedded model only")
    exact: bool = setting(False, help="Same bits as plain decoding, also in near ties; slower")


@dataclass(frozen=True)
class PromptOptions:
    """What is answered, and at what length."""

    prompt: str | None = setting(None, help="Prompt, or - for stdin", flag="-p")
    prompt_file: Path | None = setting(None, help="Read the prompt from this file", flag="-f")
    system: str | None = setting(None, help="System message of the chat")
    max_tokens: int = setting(256, help="At most this many tokens, -1 for no limit", minimum=-1, flag="-n")


@dataclass(frozen=True)
class GenerateSettings(
    PrecisionOptions,
    CacheOptions,
    EmissionOptions,
    LoadingOptions,
    DraftingOptions,
    SamplingOptions,
    PromptOptions,
    ModelOptions,
):
    """Options of `mtp-mlx generate`; sampling means what it means in mlx-lm."""

    repetition_context_size: int = setting(20, help="Tokens that count as repeated", minimum=1)
    noise: Literal["gumbel", "inverse-cdf"] | None = setting(
        None, help="Sampling method (default: the adapter's)"
    )
    first_token_sampling: bool = setting(False, help="Unverified: sample where one token is emitted")
    stop: tuple[str, ...] = setting((), help="End before this text, may be repeated")
