"""What can be trained, by the name that `--method` takes. A new method is a subclass of `Method` and a line here."""

from __future__ import annotations

from mtp_mlx.train.method import Method


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
