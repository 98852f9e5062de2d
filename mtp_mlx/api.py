"""`load`, `generate` and `stream_generate`: mlx-lm's calls and text, with several tokens per forward pass.

    from mtp_mlx import load, generate
    model, tokenizer = load("smollm2-135m")
    print(generate(model, tokenizer, prompt="Why is the sky blue?", max_tokens=100))

They work from any thread, with one generation at a time per model. Closing the generator stops a generation.
"""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx import lora
from mtp_mlx.adapter_sources import Wanted, drafter_folder, load_adapter
from mtp_mlx.answer_parts import LONGEST_TAG, Thoughts
from mtp_mlx.base_model import load_base, local_folder
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.led import led_policy
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import LayoutName
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.step import Token
from mtp_mlx.distributed import Peers
from mtp_mlx.drafters import registry
from mtp_mlx.errors import MTPError
from mtp_mlx.files import cache_dir, warn_once
from mtp_mlx.metal_kernels.dispatch import Dispatcher, default_dispatcher
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.block import Block
from mtp_mlx.model.context import beyond_context
from mtp_mlx.model.keeping_cache import UNLIMITED
from mtp_mlx.model.sharded import shard
from mtp_mlx.models import bundled_memory, resolve_model
from mtp_mlx.planning.choose import plan_drafting
from mtp_mlx.prompt_ids import Prompt, encode_prompt
from mtp_mlx.prompt_ids import chat_prompt as chat_prompt
from mtp_mlx.recommended import recommended_sampling
from mtp_mlx.text import AnswerText
from mtp_mlx.token_ids import check_ids

OTHER_NAMES = {  # arguments that others have for the same thing
    "temp": "sampling",
    "temperature": "sampling",
    "top_p": "sampling",
    "min_p": "sampling",
    "seed": "sampling",
    "draft_model": "load(..., draft_model=...)",
    "num_draft_tokens": "load(..., num_draft_tokens=...)",
    "prefill_batch_size": "completion_batch_size",
}

SET_HERE = {"prompt", "model", "policy"}  # arguments of `mtp_generate_step` that `stream_generate` sets


@dataclass
class GenerationResponse:
    """One committed token, like mlx-lm's response of the same name, and where it came from.

    Attributes:
        text: text that became final with this token; may be empty.
        token, logits: token id, and the target's raw logits [V], lazy.
        from_draft, depth: whether it is a draft, and its index in the step from 1; 0 for the target's own pick.
        prompt_tokens, prompt_tps, generation_tokens, generation_tps, peak_memory: as in mlx-lm (tokens per second,
            GB). As there, generation_tps divides all tokens so far by the time since the first one.
        stats: counts so far, shared by all responses of a generation.
        finish_reason: "stop", "length", or None before the end.
        lossless: whether the text is exactly the model's own; False for unverified emission.
        thinking: whether the text is part of the model's thinking, between the tokenizer's tags for it.
        choice: of an accepted draft, its place among those that its pass verified there, from 1 for the likeliest.
    """

    text: str
    token: int
    logits: mx.array
    from_draft: bool
    depth: int
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    stats: DecodeStats
    finish_reason: str | None = None
    lossless: bool = True
    thinking: bool = False
    choice: int = 0

    @property
    def logprobs(self) -> mx.array:
        """[V] log-probabilities under the target, as in mlx-lm's response; lazy."""
        return self.logits - mx.logsumexp(self.logits, keepdims=True)


@dataclass
class _Clock:
    """Measures the prompt and generation speed of a generation."""

    prompt_tokens: int
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0

    def prompt_tps(self) -> float:
        return self.prompt_tokens / max(self.first - self.started, 1e-9)

    def generation_tps(self, tokens: int) -> float:
        """Tokens per second after the prompt, counted as in mlx-lm from the arrival of the first token."""
        return tokens / max(time.perf_counter() - self.first, 1e-9)


def load(
    model: str = "smollm2-135m",
    adapter: str | Path | None = "auto",
    *,
    heads: str | Path | None = None,
    quantize: int | None = None,
    exact: bool = False,
    adapter_path: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    peers: Peers | None = None,
    **drafter_options: Any,
) -> tuple[AttachedModel, TokenizerWrapper]:
    """Loads a model, attaches its drafter, and returns it with its tokenizer.

    Args:
        model: "smollm2-135m" (embedded, no network), an mlx-lm folder, or a hub id; also `path_or_hf_repo`.
        adapter: an adapter folder or its hub id; "demo-heads" for the bundled MTP heads of the embedded model; "auto"
            for the bundled adapter of this model or the folder `mtp` in the model's own, if any; None for no adapter.
        heads: MTP heads that others made, instead of an adapter: hub id, folder or file of a checkpoint with heads,
            which are converted and measured once and kept in the cache; or the assistant of a Gemma 4 model.
        quantize: 4 or 8 bits, embedded model only.
        exact: compute the real rows of every step as in plain decoding, bit for bit. The text then equals that of
            plain decoding even if two tokens nearly tie. Slower, unless a kernel makes up for it.
        adapter_path: a fine-tune of mlx-lm (`mlx_lm.lora`) for this model. Drafters of the base go on drafting.
        tokenizer_config, trust_remote_code: as in mlx-lm's `load`; whether code that comes with the model may run.
        peers: the processes of `mlx.launch` (`mtp_mlx.distributed.join`) that share the model, by the same calls.
        drafter_options: options of drafters (`mtp_mlx/drafters/<name>/options.py`): loop=8 drafts eight tokens per
            step, reusing MTP heads in order if there are fewer; draft_model="..." drafts with a smaller model,
            num_draft_tokens=4 so many tokens per step; memory="..." drafts from a file of `mtp-mlx remember` too.

    Raises:
        MTPError: if there is no such model or adapter, the model lacks a seam, the adapter belongs to another base
            model, or a drafter's options do not suit the model.
    """
    path = resolve_model(model := drafter_options.pop("path_or_hf_repo", model), quantize=quantize)
    lazy = peers is not None and not peers.alone
    files = local_folder(model, quantize)
    read = partial(load_base, model, quantize, folder=files, trust_remote_code=trust_remote_code)
    base, tokenizer = read(tokenizer_config=tokenizer_config, lazy=lazy)
    source = info = None
    replaced = registry.replaces_adapter(drafter_options) and adapter == "auto"
    wanted = None if heads is None else Wanted(str(heads), str(model), files, base, tokenizer, alone=not lazy)
    folder = drafter_folder(model, path, None if replaced else adapter, wanted)
    if folder is not None:
        source, info = load_adapter(folder, base, partial(read, lazy=True) if lazy else None)
    if adapter_path is not None:
        _put_on(base, adapter_path, peers, drafted=source is not None)
    named = adapter not in ("auto", None) or heads is not None
    context = registry.LoadContext(base, tokenizer, named, bundled_memory(model), trust_remote_code)
    source = registry.prepare(source, drafter_options, context)
    texts = registry.open_texts(drafter_options, context)
    attached = attach(base, source, _kernels(base, source, peers or Peers(), exact), exact)
    attached.peers, attached.text_source = peers or Peers(), texts
    _same_texts(attached)
    attached.info = info
    attached.name, attached.recommended_sampling = str(model), recommended_sampling(files)
    with attached.peers.waiting():
        _evaluate(attached)
    return attached, tokenizer


def _put_on(base: Any, adapter_path: str | Path, peers: Peers | None, *, drafted: bool) -> None:
    """Puts a fine-tune of mlx-lm on the bare model; says so if a drafter of the base goes on drafting."""
    if peers is not None and not peers.alone:
        raise MTPError(
            "a fine-tune needs a single process: leave `adapter_path` out, or run without mlx.launch"
        )
    said = lora.put_on(base, adapter_path)
    if drafted:
        warn_once(f"fine-tune {adapter_path}", said)


def _same_texts(attached: AttachedModel) -> None:
    """Raises MTPError if processes that share a model draft from different texts: their passes would differ."""
    if not attached.peers.alone:
        texts = attached.text_source
        held = {"what `memory` holds": None if texts is None else texts.fingerprint()}
        attached.peers.must_agree(held, "give all of them the same file")


def _kernels(base: Any, source: Any, peers: Peers, exact: bool) -> Dispatcher | None:
    """The kernels of a single process; several processes divide the model instead."""
    if peers.alone:
        return default_dispatcher(cache_dir)
    if exact:
        raise MTPError("exact decoding needs a single process: leave `exact` out, or run without mlx.launch")
    shard(base, source, peers)
    return None


def _evaluate(attached: AttachedModel) -> None:
    """Evaluates weights and constants: a lazy array belongs to the thread that made it."""
    if attached.speculator is not None:
        # Once here, instead of casting every factor in every pass.
        attached.speculator.set_dtype(attached.embed(mx.zeros((1,), dtype=mx.int32)).dtype)
        mx.eval(attached.speculator.parameters(), attached.draft_head(mx.zeros((1, 1, attached.hidden_size))))
    mx.eval(
        attached.head(attached.forward(Block.real(mx.zeros((1, 1), dtype=mx.int32)), attached.make_cache()))
    )


def stream_generate(
    model: AttachedModel,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    sampling: SamplingConfig | None = None,
    layout: LayoutName = "auto",
    drafts: int | None = None,
    lookup: bool | None = None,
    emission: Emission | None = None,
    drafter: str | None = None,
    rows: int | None = None,
    stop: Sequence[str] = (),
    stats: DecodeStats | None = None,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Yields a response per token.

    Args:
        prompt: text (special tokens are added unless it starts with them, as in mlx-lm), or token ids as a list, or
            an mlx or numpy array.
        max_tokens: most tokens to yield, never exceeded; -1 for no limit.
        sampling: temperature, top-k, ..., seed; greedy by default. `model.recommended_sampling` may be another.
        layout: "auto" plans every step, or uses the result of `mtp-mlx tune` if there is one; "linear" and
            "quadratic" are fixed; "tree" spends `rows` rows on drafts with branches; "plain" is ordinary decoding.
        drafts: drafts per step, by default as many as the drafter makes; `slots` is an older name for it.
        lookup: also draft from the text itself; by default with the layouts "auto" and "tree" only.
        emission: verified by default. Unverified emission is faster but lossy, which every response says, and has its
            own layout; verified emission with a tau needs layout "quadratic" (which "auto" then means) or "linear".
        drafter: comma-separated drafters, instead of `lookup`: "slots", "heads", "assistant", "lookup" and others.
        rows: rows of a pass of layout "tree", by default 16.
        stop: strings that end the text; they are not part of it.
        stats: updated while decoding, and part of every response.
        kwargs: passed to `mtp_generate_step`: prompt_cache, max_kv_size, prefill_step_size, kv_bits, kv_group_size,
            quantized_kv_start, prompt_progress_callback, constraint, logits_processors.

    Raises:
        MTPError: if an option is wrong, the prompt is empty or has an id that the model has no row for, or the cache
                cannot be rolled back.
    """
    emission, stats = emission or Emission(), DecodeStats() if stats is None else stats
    _check_options(max_tokens, lookup, emission)
    kwargs = checked_names(kwargs, set(inspect.signature(mtp_generate_step).parameters) - SET_HERE)
    tokenizer = tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)
    ids = _checked_ids(model, tokenizer, prompt, stats, kwargs)
    drafts = kwargs.pop("slots", None) if drafts is None else drafts
    drafting = plan_drafting(model, layout, drafts, stats, lookup, drafter, emission, max_tokens, rows)
    policy = led_policy(drafting.policy, model.peers)
    kwargs |= {"sampling": sampling, "lookup": drafting.lookup, "emission": emission, "stats": stats}
    steps = mtp_generate_step(ids, model, max_tokens=max_tokens, policy=policy, **kwargs)
    reading = (
        AnswerText(tokenizer, stop, max_tokens, stats.fallbacks),
        Thoughts(tokenizer, [*kwargs.get("prefix", ())[-LONGEST_TAG:], *ids]),
    )
    with wired_limit(model.model), closing(steps):
        for response in _responses(model.peers.each(steps), *reading, len(ids), stats, emission.lossless):
            if response.finish_reason is not None:
                stats.verdict = policy.verdict
            yield response


def _checked_ids(
    model: AttachedModel,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    stats: DecodeStats,
    given: Mapping[str, Any],
) -> list[int]:
    """Token ids of a prompt; notes in `stats` if they exceed the model's context, or a limit has no effect.

    Args:
        given: arguments of `mtp_generate_step`, such as the prefix.
    """
    ids = encode_prompt(tokenizer, prompt)
    check_ids(ids, model.vocab_size, "the prompt", tokenizer)
    if note := beyond_context(model.model, len(given.get("prefix", ())) + len(ids)):
        stats.notes.append(note)
    if given.get("max_kv_size") is not None and model.makes_caches:
        stats.fallbacks[UNLIMITED] += 1
    return ids


def _responses(
    tokens: Iterator[Token],
    answer: AnswerText,
    thoughts: Thoughts,
    prompt_tokens: int,
    stats: DecodeStats,
    lossless: bool,
) -> Generator[GenerationResponse, None, None]:
    """A response per token, up to the end of the answer."""
    clock = _Clock(prompt_tokens)
    for count, item in enumerate(tokens, start=1):
        if count == 1:
            clock.first = time.perf_counter()
        text, reason = answer.feed(item.token)
        yield GenerationResponse(
            text=text,
            token=item.token,
            logits=item.logits,
            from_draft=item.from_draft,
            depth=item.depth,
            prompt_tokens=clock.prompt_tokens,
            prompt_tps=clock.prompt_tps(),
            generation_tokens=count,
            generation_tps=clock.generation_tps(count),
            peak_memory=mx.get_peak_memory() / 1e9,
            stats=stats,
            finish_reason=reason,
            lossless=lossless,
            thinking=thoughts.take(text),
            choice=item.choice,
        )
        if reason is not None:
            return


def _check_options(max_tokens: int, lookup: bool | None, emission: Emission) -> None:
    if isinstance(max_tokens, bool):
        raise MTPError(f"`max_tokens` is {max_tokens}: give `verbose` by its name")
    if max_tokens == 0 or max_tokens < -1:
        raise MTPError(f"`max_tokens` must be at least 1, or -1 for no limit; got {max_tokens}")
    if lookup and not emission.lossless:
        raise MTPError("lookup drafts must be verified: leave `lookup` out, or use `emission` verified")


def checked_names(kwargs: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The arguments, without a `sampler` that is None.

    Args:
        known: names that there are.

    Raises:
        MTPError: for an argument of mlx-lm that is another one here, or one that nobody knows.
    """
    if kwargs.get("sampler") is not None:
        raise MTPError(
            "`sampler` cannot be used, because a pick must be a function of its position: give "
            "`sampling=SamplingConfig(temperature=..., top_p=..., seed=...)`"
        )
    for name in kwargs:
        if name not in {*known, "slots", "sampler"}:
            hint = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), None)
            raise MTPError(f"unknown argument `{name}`" + (f": did you mean `{hint}`?" if hint else ""))
    return {name: value for name, value in kwargs.items() if name != "sampler"}


def generate(
    model: AttachedModel,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """The text that follows `prompt`. Arguments as `stream_generate`.

    Args:
        verbose: print the text while it is written, and then the speed, to stdout, as mlx-lm does.
    """
    text, last = "", None
    if verbose:
        print("=" * 10)
    for last in stream_generate(model, tokenizer, prompt, max_tokens, **kwargs):
        text += last.text
        if verbose:
            print(last.text, end="", flush=True)
    if verbose and last is not None:
        print("\n" + "=" * 10)
        print(f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec")
        print(f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec")
        print(f"Peak memory: {last.peak_memory:.3f} GB")
    return text
