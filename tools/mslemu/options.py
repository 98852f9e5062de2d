"""How emulated kernels are run: with or without checks, in which order, how strictly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

MODES = ("check", "fast")
ORDERS = ("forward", "reverse", "random")


@dataclass(frozen=True)
class Options:
    """How a kernel is compiled and run.

    Attributes:
        mode: "check" checks every access (races, bounds, initialisation) and counts traffic; "fast" only computes.
        order: the order in which threads and threadgroups run: "forward", "reverse" or "random".
        seed: seed of the random order.
        strict: treat divergence and reads of inactive lanes as errors; Metal leaves them undefined.
        address_spaces: compile a second time with device, constant and threadgroup as distinct address spaces.
        mlx_utils: put MLX's own utils.h in front, as MLX does.
    """

    mode: str = "check"
    order: str = "random"
    seed: int = 0
    strict: bool = True
    address_spaces: bool = True
    mlx_utils: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, not {self.mode!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order is one of {', '.join(ORDERS)}, not {self.order!r}")


_DEFAULT = Options()
_current: ContextVar[Options] = ContextVar("mslemu_options")


def current() -> Options:
    """The current options."""
    return _current.get(_DEFAULT)


@contextmanager
def options(**changes: Any) -> Iterator[Options]:
    """A context in which kernels run with changed options; see `Options` for their names."""
    token = _current.set(replace(current(), **changes))
    try:
        yield current()
    finally:
        _current.reset(token)
