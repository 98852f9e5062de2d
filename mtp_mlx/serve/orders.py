"""What the engine does in its next turn. With several processes (mlx.launch), process 0 decides it for all of them.

Every process runs an engine with its part of the model. Requests come to process 0, which tells the others at the
beginning of each turn which of them to start, which to drop, and when to stop. All that follows is a function of
these orders (picks, drafts and layouts are process 0's too, see `mtp_mlx.decode.led`), so all run the same passes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from mtp_mlx.answer_parts import PartsSettings
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.distributed import Peers
from mtp_mlx.serve.request import Event, GenerationRequest

HEARTBEAT = 30.0  # seconds after which process 0 tells the others that there is nothing to do


@dataclass
class Ticket:
    """One request in the engine.

    Attributes:
        deliver: called on the engine's thread with every event; must not block.
        cancelled: may be set from any thread; the engine checks it before every step.
    """

    request: GenerationRequest
    deliver: Callable[[Event], None]
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: threading.Event = field(default_factory=threading.Event)
    answered: bool = False

    def cancel(self) -> None:
        """Stop answering this request."""
        self.cancelled.set()


@dataclass(frozen=True)
class Order:
    """What to do in a turn.

    Attributes:
        new: requests to start.
        dropped: places of those that are being answered and were cancelled.
        stopping: end; nothing else is done.
    """

    new: tuple[Ticket, ...] = ()
    dropped: tuple[int, ...] = ()
    stopping: bool = False


def lead(peers: Peers, order: Order) -> Order:
    """Tells the other processes an order, which is returned; free in a single process."""
    if not peers.alone:
        empty = order == Order()
        told = None if empty else [[asdict(one.request) for one in order.new], order.dropped, order.stopping]
        peers.told(told)
    return order


def follow(peers: Peers) -> Order:
    """The order of process 0, waited for; its requests are answered to nobody."""
    told = peers.told()
    if told is None:
        return Order()
    new, dropped, stopping = told
    return Order(tuple(Ticket(_request(one), _nobody) for one in new), tuple(dropped), stopping)


def _nobody(_: Event) -> None:
    pass


def _request(told: dict[str, Any]) -> GenerationRequest:
    """A request from its JSON."""
    sampling, parts = dict(told["sampling"]), told["parts"]
    sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling["logit_bias"])
    sampling["xtc_special_tokens"] = tuple(sampling["xtc_special_tokens"])
    if parts is not None:
        tools = parts["tools"]
        parts = PartsSettings(**{**parts, "tools": None if tools is None else tuple(tools)})
    more = {name: tuple(told[name]) for name in ("stop", "ignored", "notes", "ends")}
    return GenerationRequest(**{**told, **more, "sampling": SamplingConfig(**sampling), "parts": parts})
