"""The processes started together by `mlx.launch`: how they exchange values, and how they end if one is lost.

All communication uses collectives of `mx.distributed`, on the backend that `mlx.launch` chose. Every process must
make the same calls in the same order, so whatever decides the next call comes from `Peers.gather`, never from one
process alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    import mlx.core as mx

Item = TypeVar("Item")

TIMEOUT_VARIABLE = "MTP_MLX_PEER_TIMEOUT"
DEFAULT_TIMEOUT = 600.0  # seconds; longer than any pause of a healthy process, such as a first compilation
SIZE_VARIABLES = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
LIST_VARIABLES = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")  # files that hold a JSON list with an entry per process
BACKENDS = ("[ring]", "[jaccl]", "[nccl]", "[mpi]", "[distributed]")


def launched_size() -> int:
    """The number of processes that `mlx.launch` started, from the environment, without loading MLX; 1 without it."""
    for name in SIZE_VARIABLES:
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    if "MLX_RANK" not in os.environ:
        return 1
    for name in LIST_VARIABLES:
        try:
            with open(os.environ.get(name, ""), encoding="utf-8") as file:
                return max(1, len(json.load(file)))
        except (OSError, ValueError, TypeError):  # mlx.launch writes an empty file for one process
            continue
    return 1


def launched_rank() -> int:
    """The rank of this process, from 0, taken from the environment."""
    values = (os.environ.get(name, "") for name in RANK_VARIABLES)
    return next((int(value) for value in values if value.isdigit()), 0)


def whose() -> str:
    """The suffix of messages that names the process, such as " (process 2 of 2)"; "" for a single process."""
    size = launched_size()
    return f" (process {launched_rank() + 1} of {size})" if size > 1 else ""


def refuse_if_many(verb: str) -> None:
    """Checks that there is one process only, for a command that several processes would just repeat.

    Raises:
        MTPError: if `mlx.launch` started several.
    """
    size = launched_size()
    if size > 1:
        raise MTPError(
            f"mtp-mlx {verb} is for one process, and mlx.launch started {size}: only train, generate "
            "and serve share their work; run it without mlx.launch"
        )


class PeerLost(MTPError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class Peers:
    """The processes of a run, seen from this one; `Peers()` is a single process, for which every call is free.

    Attributes:
        rank: rank of this process, from 0. Process 0 leads: only it prints and writes files.
        size: number of processes.
        group: MLX's group; None for a single process.
        timeout: seconds to wait for other processes before giving up.
    """

    rank: int = 0
    size: int = 1
    group: mx.distributed.Group | None = None
    timeout: float = DEFAULT_TIMEOUT

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, which must be JSON values, in order of rank.

        Raises:
            MTPError: if another process is lost.
        """
        if self.alone:
            return [value]
        import mlx.core as mx
        import numpy as np

        data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        with self.waiting():
            sizes = self._all_gather(mx.array([len(data)], dtype=mx.int32))
            longest = max(sizes)
            padded = np.pad(data, (0, longest - len(data)))
            flat = bytes(self._all_gather(mx.array(padded).astype(mx.int32)))
        pieces = (flat[rank * longest : rank * longest + size] for rank, size in enumerate(sizes))
        return [json.loads(piece) for piece in pieces]

    def told(self, value: Any = None) -> Any:
        """The JSON value of process 0, in every process; what the others give does not matter.

        Raises:
            MTPError: if another process is lost.
        """
        if self.alone:
            return value
        import mlx.core as mx
        import numpy as np

        data = b"" if value is None or not self.leads else json.dumps(value).encode()
        with self.waiting():
            size = self._all_sum(mx.array([len(data)], dtype=mx.int32))[0]
            if not size:
                return None
            own = np.frombuffer(data, dtype=np.uint8) if self.leads else np.zeros(size, dtype=np.uint8)
            return json.loads(bytes(self._all_sum(mx.array(own).astype(mx.int32))))

    def _all_sum(self, values: mx.array) -> list[int]:
        import mlx.core as mx

        summed = mx.distributed.all_sum(values, group=self.group, stream=cast("mx.Stream", mx.cpu))
        return cast("list[int]", summed.tolist())

    def _all_gather(self, values: mx.array) -> list[int]:
        import mlx.core as mx

        gathered = mx.distributed.all_gather(values, group=self.group, stream=cast("mx.Stream", mx.cpu))
        return cast("list[int]", gathered.tolist())

    def share(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """The arrays of process 0, in every process.

        Args:
            arrays: {name: array}, with the same names, shapes and dtypes in every process.

        Raises:
            MTPError: if these differ, or another process is lost.
        """
        if self.alone:
            return arrays
        import mlx.core as mx

        shapes = [[name, list(array.shape), str(array.dtype)] for name, array in sorted(arrays.items())]
        every = self.gather(shapes)
        if any(own != every[0] for own in every):
            raise MTPError(
                "the processes hold different tensors: give all of them the same model and settings"
            )
        stream = cast("mx.Stream", mx.cpu)
        out = {}
        with self.waiting():
            for name in sorted(arrays):
                own = arrays[name] if self.leads else mx.zeros_like(arrays[name])
                out[name] = mx.distributed.all_sum(own, group=self.group, stream=stream)
            mx.eval(out)
        return out

    def weighted_mean(self, gradients: dict, share: float) -> dict:
        """The sum over all processes of share * gradients; the shares sum to 1.

        Raises:
            MTPError: if another process is lost.
        """
        if self.alone:
            return gradients
        import mlx.core as mx
        from mlx.nn.utils import average_gradients
        from mlx.utils import tree_map

        # A list, because `average_gradients` takes a dot in a name for another level of the tree.
        scaled: list[mx.array] = []
        tree_map(lambda leaf: scaled.append(leaf * (share * self.size)), gradients)
        with self.waiting():
            mean = average_gradients(scaled, group=self.group)
            mx.eval(mean)
        leaves = iter(mean)
        return cast("dict", tree_map(lambda _: next(leaves), gradients))

    def must_agree(self, values: dict[str, Any], remedy: str) -> None:
        """Checks that all processes have the same JSON values.

        Raises:
            MTPError: if one differs from that of process 0 (names both, and adds `remedy`), or another process is
                lost.
        """
        every = self.gather(values)
        for rank, theirs in enumerate(every):
            for name, first in every[0].items():
                if theirs.get(name) != first:
                    raise MTPError(
                        f"{name} of process {rank + 1} is {theirs.get(name)!r}, of process 1 {first!r}: {remedy}"
                    )

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Surrounds code that waits for other processes, so that a lost or silent process ends it with a message.

        A collective that waits for a hanging process cannot be cancelled: after `timeout` seconds a message is
            printed
        and this process exits.

        Raises:
            PeerLost: if the connection to another process is lost.
        """
        if self.alone:
            yield
            return
        timer = threading.Timer(self.timeout, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith(BACKENDS):
                raise
            raise PeerLost(
                f"the connection to another process of this run was lost ({error}): see its own message; the same "
                "command starts or continues the run"
            ) from error
        finally:
            timer.cancel()

    def each(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yields `items`, each of which all processes must compute together.

        Raises:
            MTPError: if another process is lost.
        """
        while True:
            with self.waiting():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def _give_up(self) -> None:
        os.write(
            sys.stderr.fileno(),
            (
                f"Error{whose()}: another process of this run has not answered for {self.timeout:g} seconds, so "
                f"this one ends; {TIMEOUT_VARIABLE} sets how long to wait\n"
            ).encode(),
        )
        os._exit(2)  # the waiting thread is inside MLX and cannot receive an exception


def _ended(*_: Any) -> None:
    """Handles SIGTERM, which `mlx.launch` sends to all other processes if one fails."""
    raise PeerLost(
        "mlx.launch has ended this process, because another process of this run was lost: see its message"
    )


def join() -> Peers:
    """Connects the processes that `mlx.launch` started; `Peers()` if there is only one.

    Raises:
        MTPError: if they cannot be connected, or the timeout is not a positive number.
    """
    size = launched_size()
    if size == 1:
        return Peers()
    import mlx.core as mx

    given = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT))
    try:
        timeout = float(given)
    except ValueError:
        timeout = 0.0
    if not timeout > 0:
        raise MTPError(f"{TIMEOUT_VARIABLE} is {given!r}: give a number of seconds above 0")
    with suppress(ValueError):  # not in the main thread: signals are left to the caller
        signal.signal(signal.SIGTERM, _ended)
    with Peers(launched_rank(), size, None, timeout).waiting():
        group = mx.distributed.init()
    if group.size() != size:
        raise MTPError(
            f"mlx.launch started {size} processes, and MLX connected {group.size()}: name a backend that this "
            "machine has, as in mlx.launch --backend ring"
        )
    return Peers(group.rank(), size, group, timeout)
