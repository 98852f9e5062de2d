"""Measures `StepCost` for a model on this machine, once, and stores it in the user's cache.

The key holds device, mlx version, BLAS threads, model, dtype, drafter and kernels: if any of them changes, costs are
measured again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import mlx.core as mx

from mtp_mlx.decode.drafter import DraftSource, Verified, source_of
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import speculative_step
from mtp_mlx.decode.pick import Picker
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.step import shape_of
from mtp_mlx.files import cache_dir
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.planning.cost import StepCost, interpolate, read_cost, save_cost

REAL_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
SLOT_ROWS = (1, 2, 4, 8, 12, 20)  # without lead rows, which draft nothing
SHORT_CONTEXT, LONG_CONTEXT = 64, 768
REPEATS = 3

log = logging.getLogger("mtp_mlx")


def step_cost(model: AttachedModel, tell: Callable[[str], None] | None = None) -> StepCost:
    """The cached measurement for this model on this machine, or a new one, which takes a few seconds.

    Args:
        model: the model with its drafter.
        tell: called with a sentence before measuring; None to log it as a warning.
    """
    key = cost_key(model)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir() / "costs" / f"{digest}.json"
    cost = read_cost(path, key)
    if not all(model.peers.gather(cost is not None)):  # all processes must measure together
        (tell or log.warning)("measuring what a step costs on this machine (once per model)")
        with model.peers.waiting():
            cost = measure(model)
        save_cost(path, cost, key)
    assert cost is not None
    return cost


def cost_key(model: AttachedModel) -> dict[str, str]:
    """Everything that a measurement depends on."""
    device = mx.default_device()
    name = platform.processor() or platform.machine()
    if device == mx.Device(mx.gpu):
        name = str(mx.device_info().get("device_name", name))
    source = source_of(model)
    shape = "none" if source is None else source.cost_key(model.draft_head.columns)
    embedded = model.embed(mx.zeros((1,), dtype=mx.int32))
    key = {
        "version": "2",
        "device": f"{device} {name} {os.cpu_count()}",
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", "default"),
        "mlx": importlib.metadata.version("mlx"),
        "model": base_fingerprint(model.model),
        "dtype": f"{embedded.dtype} {'quantised' if _is_quantised(model) else 'dense'}",
        "adapter": shape if model.peers.alone else f"{shape}, part {model.peers.rank} of {model.peers.size}",
        "kernels": "none" if model.kernels is None else model.kernels.description,
        "exact": str(model.exact),
    }
    # Added only if there are lead rows: older measurements of such adapters lack the entry and counted too few rows.
    return {**key, "lead": str(model.lead)} if model.lead else key


def _is_quantised(model: AttachedModel) -> bool:
    return any("scales" in module for _, module in model.model.named_modules())


def measure(model: AttachedModel) -> StepCost:
    """Times a step of every size in the table, as the median of a few runs."""
    source = source_of(model)
    slots = source if source is not None and source.places_slots else None
    prompt = [token % model.vocab_size for token in range(3, LONG_CONTEXT + 4)]
    real: dict[int, list[float]] = {}
    plain = {}
    for context in (LONG_CONTEXT, SHORT_CONTEXT):
        session = _session(model, slots, prompt[: context + 1])
        real[context] = [_seconds(session, Layout(rows - 1, (0,) * rows)) for rows in REAL_ROWS]
        plain[context] = _plain_seconds(session)
    drafting = _Drafting()
    if slots is not None:
        drafting = _slot_seconds(session, slots, real[SHORT_CONTEXT])
    elif source is not None:
        drafting = _Drafting(draft=_chain_seconds(model, source, prompt[: SHORT_CONTEXT + 1]))
    return StepCost(
        rows=REAL_ROWS,
        contexts=(SHORT_CONTEXT, LONG_CONTEXT),
        short=tuple(real[SHORT_CONTEXT]),
        long=tuple(real[LONG_CONTEXT]),
        slot_rows=drafting.slot_rows,
        surcharge=drafting.surcharge,
        draft=drafting.draft,
        plain=(plain[SHORT_CONTEXT], plain[LONG_CONTEXT]),
        lead=model.lead,
    )


@dataclass(frozen=True)
class _Drafting:
    """The cost of drafting besides the pass: the fields of the same names of `StepCost`."""

    draft: float = 0.0
    slot_rows: tuple[int, ...] = (1,)
    surcharge: tuple[float, ...] = (0.0,)


def _session(model: AttachedModel, source: DraftSource | None, prompt: list[int]) -> Session:
    """A greedy session that has run its prompt and drafts with `source`."""
    picker = Picker()
    opened = None if source is None else lambda start: source.open(model, picker, source.drafts, start)
    session = Session(model, picker, prompt, model.make_cache(), CacheSettings(), opened)
    session.prefill()
    return session


def _slot_seconds(session: Session, source: DraftSource, real: list[float]) -> _Drafting:
    """Measures what slot rows cost beyond as many real rows, and what drafting one token from them costs.

    Args:
        session: with a drafter of `source`.
        source: the model's drafter, which uses slots.
        real: seconds of steps of `REAL_ROWS` real rows, at the same context.
    """
    model, most = session.attached, source.drafts
    one, four = (_propose_seconds(session, count) for count in (1, 1 + most))
    draft = max(0.0, (four - one) / most)
    surcharge: list[float] = []
    slot_rows: list[int] = []
    for count in SLOT_ROWS:
        groups = tuple(min(most, max(0, count - most * group)) for group in range(-(-count // most)))
        layout = Layout(len(groups) - 1, groups)
        lead_rows = layout.lead_rows(model.lead)
        as_real = _interpolated(real, layout.rows + lead_rows)
        slot_rows.append(layout.slot_rows + lead_rows)
        surcharge.append(_seconds(session, layout) - as_real - draft * max(groups))
    return _Drafting(draft, tuple(slot_rows), tuple(surcharge))


def _interpolated(seconds: list[float], rows: int) -> float:
    return interpolate(REAL_ROWS, seconds, rows)


def _seconds(session: Session, layout: Layout) -> float:
    """Median seconds of a step; the session is restored afterwards."""
    length, cached = len(session.tokens), session.cached
    times = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        speculative_step(session, layout, [1] * layout.drafts)
        times.append(time.perf_counter() - started)
        session.trim(session.cached - cached)
        del session.tokens[length:]
    return median(times[1:])


def _chain_seconds(model: AttachedModel, source: DraftSource, prompt: list[int]) -> float:
    """Seconds to draft one token of a chain, after a block that verifies as many drafts as the source makes."""
    session, chain = _session(model, source, prompt), source.drafts

    def seconds(layout: Layout) -> float:
        times = []
        for _ in range(1 + REPEATS):  # the text grows a little: a drafter cannot be rolled back
            started = time.perf_counter()
            speculative_step(session, layout, [1] * layout.drafts)
            times.append(time.perf_counter() - started)
        return median(times[1:])

    with_chain = seconds(Layout.chained(chain, chain))
    return max(0.0, with_chain - seconds(Layout.chained(chain, 0))) / chain


def _plain_seconds(session: Session, steps: int = 6) -> float:
    """Seconds of a plain step that starts before the previous one is read; the text grows by a few tokens."""
    ahead = session.plain_pass(mx.array([1], dtype=mx.int32), 0)[0]
    mx.async_eval(ahead)
    times = []
    for _ in range(steps):
        following = session.plain_pass(ahead, 1)[0]
        mx.async_eval(following)
        mx.eval(ahead)
        times.append(time.perf_counter())
        ahead = following
    mx.eval(ahead)
    return median([after - before for before, after in zip(times, times[1:], strict=False)])


def _propose_seconds(session: Session, count: int) -> float:
    """Seconds to draft `count` tokens from hidden states that are already there."""
    model, drafter = session.attached, session.drafter
    assert drafter is not None
    layout = Layout(0, (count,))
    shape = shape_of(session, layout)
    zero = mx.array(0, dtype=mx.int32)
    hidden = mx.zeros((shape.rows, model.hidden_size), dtype=model.embed(zero).dtype)
    seen = Verified(
        layout=layout,
        shape=shape,
        hidden=hidden,
        head_input=mx.zeros((1, 1, model.head_input_size), dtype=hidden.dtype),
        logits=mx.zeros((1, 1)),
        picks=zero.reshape(1),
        accepted=zero,
        position=zero,
        history=None,
        tokens=session.tokens,
        drafts=[],
    )
    times = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        fresh = drafter.propose(seen)
        mx.eval(fresh.ids, fresh.confidences)
        times.append(time.perf_counter() - started)
    return median(times[1:])
