"""What the engine counts for `/metrics`."""

from __future__ import annotations

import mlx.core as mx

from mtp_mlx.answer_parts import UNREAD_CALL
from mtp_mlx.serve.metrics import Metrics
from mtp_mlx.serve.prefix_cache import PrefixCache
from mtp_mlx.serve.request import Summary
from mtp_mlx.serve.sequence import Sequence


def count_text(metrics: Metrics, sequence: Sequence, summary: Summary) -> None:
    """Counts a text that has ended."""
    add, stats = metrics.add, sequence.stats
    add("mtp_mlx_prompt_tokens_total", summary.prompt_tokens)
    add("mtp_mlx_cached_prompt_tokens_total", summary.cached_tokens)
    add("mtp_mlx_generated_tokens_total", summary.generation_tokens)
    add("mtp_mlx_steps_total", stats.steps)
    add("mtp_mlx_tool_calls_total", sequence.n_calls)
    add("mtp_mlx_unread_tool_calls_total", stats.fallbacks[UNREAD_CALL])
    for depth, (reached, accepted) in enumerate(zip(stats.submitted, stats.accepted, strict=True), start=1):
        add("mtp_mlx_drafts_reached_total", reached, depth=depth)
        add("mtp_mlx_drafts_accepted_total", accepted, depth=depth)


def gauge(metrics: Metrics, load: tuple[int, int], prefixes: PrefixCache) -> None:
    """Sets what is measured at the moment; `load` are the numbers of waiting and of active requests."""
    waiting, active = load
    metrics.set("mtp_mlx_waiting", waiting)
    metrics.set("mtp_mlx_active", active)
    metrics.set("mtp_mlx_prefix_cache_bytes", prefixes.nbytes)
    metrics.set("mtp_mlx_prefix_cache_entries", len(prefixes))
    metrics.set("mtp_mlx_prefix_cache_ends", prefixes.ends)
    metrics.set("mtp_mlx_prefix_cache_evicted_total", prefixes.evicted)
    if prefixes.files is not None:
        metrics.set("mtp_mlx_prefix_files", len(prefixes.files))
        metrics.set("mtp_mlx_prefix_files_bytes", prefixes.files.nbytes)
        metrics.set("mtp_mlx_prefix_files_read_total", prefixes.files.loads)
    metrics.set("mtp_mlx_mlx_memory_bytes", mx.get_active_memory())
