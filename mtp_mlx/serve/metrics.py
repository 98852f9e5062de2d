"""Counters of the server, in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
MOST_FIELDS, LONGEST_FIELD = 64, 64

HELP = {
    "mtp_mlx_requests_total": ("counter", "HTTP requests answered, by path and status"),
    "mtp_mlx_cancelled_total": ("counter", "Requests whose client disconnected"),
    "mtp_mlx_ignored_fields_total": ("counter", "Fields of requests that had no effect, by name"),
    "mtp_mlx_tool_calls_total": ("counter", "Tool calls written"),
    "mtp_mlx_unread_tool_calls_total": ("counter", "Tool calls that could not be read and were left as text"),
    "mtp_mlx_prompt_tokens_total": ("counter", "Prompt tokens"),
    "mtp_mlx_cached_prompt_tokens_total": ("counter", "Prompt tokens taken from the prefix cache"),
    "mtp_mlx_generated_tokens_total": ("counter", "Tokens written"),
    "mtp_mlx_steps_total": ("counter", "Decoding steps, summed over sequences"),
    "mtp_mlx_drafts_reached_total": ("counter", "Drafts checked, by depth"),
    "mtp_mlx_drafts_accepted_total": ("counter", "Drafts accepted, by depth"),
    "mtp_mlx_batched_passes_total": ("counter", "Forward passes shared by several sequences"),
    "mtp_mlx_waiting": ("gauge", "Requests in the queue"),
    "mtp_mlx_active": ("gauge", "Requests being answered"),
    "mtp_mlx_prefix_cache_bytes": ("gauge", "Bytes in the prefix cache"),
    "mtp_mlx_prefix_cache_entries": ("gauge", "Texts in the prefix cache"),
    "mtp_mlx_prefix_cache_ends": ("gauge", "Lengths of these texts at which a state is kept"),
    "mtp_mlx_prefix_cache_evicted_total": ("counter", "States dropped so far to stay within the budget"),
    "mtp_mlx_prefix_files": ("gauge", "Texts of the prefix cache on disk"),
    "mtp_mlx_prefix_files_bytes": ("gauge", "Bytes of these files"),
    "mtp_mlx_prefix_files_read_total": ("counter", "Texts read back from disk"),
    "mtp_mlx_mlx_memory_bytes": ("gauge", "Memory used by MLX arrays, in bytes"),
}


class Metrics:
    """Counters and gauges by name and labels; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[tuple[str, str]] = Counter()
        self._fields: set[str] = set()
        self._first: Counter[float] = Counter()
        self._first_sum = 0.0
        self._first_count = 0

    def add(self, name: str, amount: float = 1, **labels: str | int) -> None:
        """Add to a counter."""
        with self._lock:
            self._values[name, _labels(labels)] += amount  # type: ignore[assignment]

    def ignored(self, fields: Iterable[str]) -> list[str]:
        """Count fields that had no effect; returns those counted by name for the first time.

        The names come from clients, so only the first `MOST_FIELDS` are counted by name, and the rest as "other".
        """
        new = []
        for field in fields:
            with self._lock:
                if (
                    field not in self._fields
                    and len(self._fields) < MOST_FIELDS
                    and len(field) <= LONGEST_FIELD
                ):
                    self._fields.add(field)
                    new.append(field)
                known = field in self._fields
            self.add("mtp_mlx_ignored_fields_total", field=field if known else "other")
        return new

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name, ""] = value  # type: ignore[assignment]

    def value(self, name: str, **labels: str | int) -> float:
        """The current value; 0 if it was never set."""
        with self._lock:
            return self._values[name, _labels(labels)]

    def first_token(self, seconds: float) -> None:
        """Record the seconds from a request's arrival to its first token."""
        with self._lock:
            self._first_sum += seconds
            self._first_count += 1
            for bound in BUCKETS:
                if seconds <= bound:
                    self._first[bound] += 1

    def text(self) -> str:
        """All metrics, in Prometheus text format 0.0.4."""
        with self._lock:
            lines: list[str] = []
            for name, (kind, about) in HELP.items():
                lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
                found = sorted((labels, v) for (known, labels), v in self._values.items() if known == name)
                lines += [f"{name}{labels} {_number(value)}" for labels, value in found]
            name = "mtp_mlx_first_token_seconds"
            lines += [f"# HELP {name} Seconds until the first token", f"# TYPE {name} histogram"]
            lines += [f'{name}_bucket{{le="{bound:g}"}} {self._first[bound]}' for bound in BUCKETS]
            lines += [f'{name}_bucket{{le="+Inf"}} {self._first_count}']
            lines += [f"{name}_sum {self._first_sum}", f"{name}_count {self._first_count}"]
        return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str | int]) -> str:
    pairs = (f'{key}="{_escaped(str(value))}"' for key, value in sorted(labels.items()))
    return "{" + ",".join(pairs) + "}" if labels else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
