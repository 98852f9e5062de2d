"""Options that several verbs share, in blocks: a verb's settings class inherits the blocks it needs.

A dataclass lists the fields of its last base first and its own fields last, so bases are written in the reverse of
the order in which `--help` shows their blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtp_mlx.config import setting, trust_setting
from mtp_mlx.drafters import registry


@dataclass(frozen=True)
class ModelOptions:
    """The model and its adapter."""

    model: str = setting("smollm2-135m", help="Embedded model, mlx-lm folder or hub id", flag="-m")
    adapter: str = setting(
        "auto", help="Adapter folder or hub id, 'auto' for the bundled one, or 'none'", flag="-a"
    )
    heads: str | None = setting(None, help="MTP heads, or a Gemma 4 assistant: hub id, folder or file")
    adapter_path: str | None = setting(None, help="Fine-tune of mlx_lm.lora to put on the model")
    trust_remote_code: bool = trust_setting()
    extra_eos_token: tuple[str, ...] = setting((), help="Also stop at this token; may be repeated")


@dataclass(frozen=True)
class ThinkingOptions:
    """Whether the model thinks before it answers."""

    thinking: Literal["auto", "on", "off"] = setting("auto", help="Switch the model's thinking on or off")


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are picked, as in mlx-lm; None is greedy, or what the model recommends if that is asked for."""

    sampling: Literal["model"] | None = setting(
        None,
        help="Sample as the model's generation_config.json recommends",
    )
    temp: float | None = setting(None, help="Sampling temperature (default: 0 = greedy)", minimum=0)
    top_k: int | None = setting(None, help="Sample from the k most likely tokens (default: all)", minimum=0)
    top_p: float | None = setting(
        None, help="Sample from the top tokens of this total probability (default: 1)", minimum=0, maximum=1
    )
    min_p: float | None = setting(
        None, help="Minimum probability, as a fraction of the top one's (default: 0)", minimum=0, maximum=1
    )
    repetition_penalty: float | None = setting(
        None, help="Penalty on repeated tokens (default: 1 = off)", minimum=0
    )
    seed: int = setting(0, help="Random seed", minimum=0)


@dataclass(frozen=True)
class XtcOptions:
    """Exclude top choices, as in mlx-lm."""

    xtc_probability: float = setting(
        0.0, help="Chance of dropping the likeliest tokens at a position", minimum=0, maximum=1
    )
    xtc_threshold: float = setting(
        0.1, help="Probability of the tokens that may be dropped so", minimum=0, maximum=0.5
    )


DRAFTERS = f"Drafters, comma-separated: {', '.join(registry.drafter_names())}, lookup"


@dataclass(frozen=True)
class DraftingOptions:
    """Which drafters to use, how many drafts, and their layout in a pass."""

    layout: Literal["auto", "linear", "quadratic", "tree", "plain"] = setting(
        "auto", help="Layout of drafts and slots in a step"
    )
    rows: int | None = setting(None, help="Rows of a step of layout tree (default: 16)", minimum=2)
    drafts: int | None = setting(None, help="Drafts per step", minimum=1, old_option="--slots")
    lookup: bool | None = setting(None, help="Also draft from the text so far (default: in auto and tree)")
    drafter: str | None = setting(None, help=DRAFTERS)


# Options of single drafters, declared in their own folders.
LoadingOptions: Any = registry.loading_block()
LearningOptions: Any = registry.learning_block()  # of commands that answer people


@dataclass(frozen=True)
class EmissionOptions:
    """Whether drafts are verified before they are written."""

    emit: Literal["verified", "conf-adapt", "static"] = setting(
        "verified", help="Verify drafts, or emit them unverified (lossy)"
    )
    tau: float | None = setting(None, help="Minimum probability of a draft (conf-adapt: 0.9)")


@dataclass(frozen=True)
class CacheOptions:
    """Quantisation of the KV cache."""

    kv_bits: Literal[2, 3, 4, 6, 8] | None = setting(None, help="Quantise the KV cache to this many bits")
    kv_group_size: Literal[32, 64, 128] = setting(64, help="Group size of the KV cache quantisation")
    quantized_kv_start: int = setting(5000, help="Quantise the KV cache after this many tokens", minimum=0)


@dataclass(frozen=True)
class PrefixOptions:
    """What the model has read before the prompt, and how it reads the prompt."""

    prompt_cache_file: Path | None = setting(
        None, help="Go on behind the text that mtp-mlx or mlx_lm cache-prompt kept in this file"
    )
    max_kv_size: int | None = setting(
        None, help="Most tokens in the KV cache: the first 4 stay, then the last ones", minimum=5
    )
    prefill_step_size: int = setting(2048, help="Tokens of the prompt in a pass", minimum=1)


@dataclass(frozen=True)
class PrecisionOptions:
    """Precision of the weights and of the computation."""

    quantize: Literal[4, 8] | None = setting(None, help="Quantise the embedded model to this many bits")
    exact: bool = setting(False, help="Match plain decoding bit for bit (slower)")


@dataclass(frozen=True)
class PromptOptions:
    """The prompt, and how long the text may be."""

    prompt: str | None = setting(None, help="Prompt text, or - for stdin", flag="-p")
    prompt_file: Path | None = setting(None, help="Read the prompt from this file", flag="-f")
    system: str | None = setting(None, help="System message", old_option="--system-prompt")
    prefill_response: str | None = setting(None, help="Begin the answer with this text")
    chat_template_config: str | None = setting(
        None, help="Further variables of the chat template, as a JSON object"
    )
    max_tokens: int = setting(
        256, help="Maximum number of tokens (mlx-lm's -m); -1 = no limit", minimum=-1, flag="-n"
    )


@dataclass(frozen=True)
class GenerateSettings(
    PrecisionOptions,
    PrefixOptions,
    CacheOptions,
    EmissionOptions,
    LoadingOptions,
    DraftingOptions,
    XtcOptions,
    SamplingOptions,
    ThinkingOptions,
    PromptOptions,
    ModelOptions,
):
    """Options of `mtp-mlx generate`; sampling options mean what they mean in mlx-lm."""

    repetition_context_size: int = setting(20, help="Number of last tokens the penalty looks at", minimum=1)
    min_tokens_to_keep: int = setting(1, help="Tokens that --min-p never removes", minimum=1)
    logit_bias: tuple[str, ...] = setting((), help="ID=BIAS to add to a token's logit; may be repeated")
    noise: Literal["gumbel", "inverse-cdf"] | None = setting(
        None, help="Sampling method (default: the adapter's)"
    )
    first_token_sampling: bool = setting(False, help="Unverified only: sample when a pass emits one token")
    stop: tuple[str, ...] = setting((), help="Stop before this text; may be repeated")
