"""Every drafter there is, a line each. A room is imported when it is used: `--help` loads neither mlx nor a room.

What a room `mtp_mlx/drafters/<room>/` holds for the rest of the package, by fixed names:

    options.py   needs no mlx    LOADING: dataclass of what `load` and the command line take, or None
                                 TRAINS: {training method: `Trains`}
    folder.py                    load(folder, header, model) -> (DraftSource, what the folder says about itself)
    loading.py   if LOADING      prepare(source, options, context) -> DraftSource | None
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from mtp_mlx.train.method import Method


@dataclass(frozen=True)
class Room:
    """One drafter.

    Attributes:
        name: its folder below `mtp_mlx/drafters`.
        adapters: values of `method` in `mtp_config.json` whose folders it reads.
        trains: methods it trains, as in `mtp-mlx train METHOD`.
    """

    name: str
    adapters: tuple[str, ...] = ()
    trains: tuple[str, ...] = ()

    def module(self, name: str) -> Any:
        """The room's module `name`."""
        return importlib.import_module(f"mtp_mlx.drafters.{self.name}.{name}")


ROOMS = (
    Room("masks", adapters=("mask-tokens",), trains=("mask-tokens", "conf-adapt")),
    Room("heads", adapters=("mtp-heads",), trains=("mtp-heads",)),
    Room("ptp", adapters=("ptp",), trains=("ptp",)),
)


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        KeyError: no such method.
    """
    from mtp_mlx.drafters.heads.method import TrainHeads
    from mtp_mlx.drafters.masks.conf_adapt import ConfAdapt
    from mtp_mlx.drafters.masks.method import MaskTokens
    from mtp_mlx.drafters.ptp.method import TrainPTP

    classes: tuple[type[Method], ...] = (MaskTokens, TrainHeads, ConfAdapt, TrainPTP)
    return {kind.name: kind for kind in classes}[name]
