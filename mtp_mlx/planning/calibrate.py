"""What steps of a model cost on this machine: measured once (`timing.py`) and kept in the user's cache.

The key holds device, mlx version, BLAS threads, model, dtype, drafter and kernels: if any of them changes, costs are
measured again. The first measurement takes about `BUDGET` seconds, however slow a step is. If that was too short for
everything, later runs go on with it: each may take `SHARE` of its own expected time, and what is too little for a
step is saved up for the next run. Until then `CostCorrection` learns from real steps. A few tokens are not worth
measuring for.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from mtp_mlx.decode.drafter import source_of
from mtp_mlx.files import cache_dir, keep_if_possible, kept_file
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.model.seams import updated_layers
from mtp_mlx.planning.cost import StepCost, read_cost, save_cost
from mtp_mlx.planning.timing import Progress, measure, seconds_to_go_on

BUDGET = 3.0  # seconds of the first measurement
SHARE = 0.02  # of a later run's expected time, for what the first one had no time for
FEW_TOKENS = 16  # fewer are written sooner than measured

CostKey = dict[str, str]

log = logging.getLogger("mtp_mlx")
# By this process, which may be unable to keep them in files: costs by file, or by name if there is no place for one.
_measured: dict[str, StepCost] = {}
_gone_on: set[str] = set()  # files or names of costs that this process has gone on with, which it does once
_saved_up: set[str] = set()  # and for which it has saved up time


def step_cost(
    model: AttachedModel, tell: Callable[[str], None] | None = None, progress: Progress | None = None
) -> StepCost:
    """The kept measurement for this model on this machine, or a new one, which takes about `BUDGET` seconds.

    Args:
        model: the model with its drafter.
        tell: called with a sentence before measuring; None to log it as a warning.
        progress: called while measuring with the number of sizes timed and of all.
    """
    key = cost_key(model)
    cost = _known(model, key)
    return _first(model, key, tell, progress) if cost is None else cost


def _first(
    model: AttachedModel,
    key: CostKey,
    tell: Callable[[str], None] | None,
    progress: Progress | None,
) -> StepCost:
    """The first measurement."""
    (tell or log.warning)(f"measuring what a step costs on this machine (once per model, about {BUDGET:g} s)")
    return _measure(model, key, None, BUDGET, progress)


def prepare_costs(
    model: AttachedModel,
    max_tokens: int | None,
    tell: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> bool:
    """Measures what steps cost as far as that is worth it before a text of at most so many tokens.

    Args:
        model: the model with its drafter.
        max_tokens: most tokens of the text; -1 and None are no limit.
        tell, progress: as for `step_cost`.

    Returns:
        Whether costs are known now. They are not if the text is too short to measure for.
    """
    limit = None if max_tokens == -1 else max_tokens
    key = cost_key(model)
    cost = _known(model, key)
    if cost is None:
        if limit is not None and limit <= FEW_TOKENS:
            return False
        _first(model, key, tell, progress)
    elif _place(key) not in _gone_on:
        _go_on(model, key, cost, limit, progress)
    return True


def _go_on(
    model: AttachedModel, key: CostKey, cost: StepCost, limit: int | None, progress: Progress | None
) -> None:
    """Measures what is missing of `cost`, or saves up time for it, before a text of at most `limit` tokens."""
    needed = seconds_to_go_on(model, cost)
    if model.peers.gather(needed is None)[0]:
        return
    place = _place(key)
    share = BUDGET if limit is None else SHARE * limit * cost.plain_seconds
    seconds = min(BUDGET, cost.saved_up + share)
    long_enough = limit is None or limit > FEW_TOKENS
    if model.peers.gather(long_enough and needed is not None and needed <= seconds)[0]:
        _gone_on.add(place)
        _measure(model, key, cost, seconds, progress)
    elif place not in _saved_up and seconds > cost.saved_up:
        _saved_up.add(place)
        _keep(key, replace(cost, saved_up=seconds))


def _measure(
    model: AttachedModel, key: CostKey, known: StepCost | None, seconds: float, progress: Progress | None
) -> StepCost:
    """Measures and keeps what is not `known`, for so many seconds."""
    with model.peers.waiting():
        cost = measure(model, seconds, known, progress)
    _keep(key, cost)
    return cost


def _keep(key: CostKey, cost: StepCost) -> None:
    _measured[_place(key)] = cost
    keep_if_possible(lambda: save_cost(cache_dir().joinpath(*_names(key)), cost, key), "step costs")


def _known(model: AttachedModel, key: CostKey) -> StepCost | None:
    """The costs that this process or an earlier one has measured.

    All processes that share a model must run the same passes: unless all of them know the same sizes, nothing is
    known.
    """
    file = kept_file(*_names(key))
    cost = _measured.get(_place(key)) or (None if file is None else read_cost(file, key))
    sizes = None if cost is None else [cost.rows, cost.slot_rows, len(cost.plain), cost.draft is None]
    all_sizes = model.peers.gather(sizes)
    return cost if all(other == all_sizes[0] for other in all_sizes) else None


def _place(key: CostKey) -> str:
    names = _names(key)
    return str(kept_file(*names) or names)


def _names(key: CostKey) -> tuple[str, str]:
    """Folder and name of the file in the cache."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return "costs", f"{digest}.json"


def cost_key(model: AttachedModel) -> CostKey:
    """Everything that a measurement depends on."""
    device = mx.default_device()
    name = platform.processor() or platform.machine()
    if device == mx.Device(mx.gpu):
        name = str(mx.device_info().get("device_name", name))
    source = source_of(model)
    shape = "none" if source is None else source.cost_key(model.draft_head.columns)
    embedded = model.embed(mx.zeros((1,), dtype=mx.int32))
    key = {
        "version": "3",
        "device": f"{device} {name} {os.cpu_count()}",
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", "default"),
        "mlx": importlib.metadata.version("mlx"),
        "model": base_fingerprint(model.model),
        "dtype": f"{embedded.dtype} {'quantised' if _is_quantised(model) else 'dense'}",
        "adapter": shape if model.peers.alone else f"{shape}, part {model.peers.rank} of {model.peers.size}",
        "kernels": "none" if model.kernels is None else model.kernels.description,
        "exact": str(model.exact),
    }
    if tuned := updated_layers(model.model):
        key["fine-tune"] = tuned
    # Added only if there are lead rows: older measurements of such adapters lack the entry and counted too few rows.
    return {**key, "lead": str(model.lead)} if model.lead else key


def _is_quantised(model: AttachedModel) -> bool:
    return any("scales" in module for _, module in model.model.named_modules())
