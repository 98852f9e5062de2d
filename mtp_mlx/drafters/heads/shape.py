"""Shape of trained heads: layers of a head, states of the trunk that it reads, one head for all drafts or many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mtp_mlx.drafters.heads.config import HeadsConfig, block_layers
from mtp_mlx.drafters.heads.options import DEFAULT_LAYERS, DEFAULT_SHARED, DEFAULT_TAPS, HeadsSettings
from mtp_mlx.drafters.heads.taps import layer_numbers
from mtp_mlx.errors import MTPError


@dataclass(frozen=True)
class HeadShape:
    """The shape of new heads.

    Attributes:
        layers: decoder layers of a head.
        taps: the states of the trunk that the first head reads, as in `HeadsSettings.taps`.
        shared: whether one head makes all drafts, each on its own state.
    """

    layers: int
    taps: str
    shared: bool

    @classmethod
    def of(cls, settings: HeadsSettings) -> HeadShape:
        """What the settings say, or the defaults."""
        return cls(
            layers=DEFAULT_LAYERS if settings.layers is None else settings.layers,
            taps=DEFAULT_TAPS if settings.taps is None else settings.taps,
            shared=DEFAULT_SHARED if settings.shared is None else settings.shared,
        )


def is_shared(config: HeadsConfig) -> bool:
    """Whether a folder has one head that makes several drafts."""
    return config.count == 1 and config.drafts > 1


def drafts_to_train(config: HeadsConfig, settings: HeadsSettings) -> int:
    """Drafts per step that the heads of `start_from` are trained for: those the settings say, or else their own.

    A single head of one draft that is to be `shared` has no number of its own, and gets that of new heads.
    """
    if settings.heads is not None:
        return settings.heads
    if settings.shared and config.count == config.drafts == 1:
        return settings.new_drafts()
    return config.drafts if is_shared(config) else config.count


def check_start(
    folder: Path, config: HeadsConfig, settings: HeadsSettings, drafts: int, trunk_layers: int
) -> bool:
    """Whether training goes on with one head for all depths from the heads in `folder`, their first one.

    Args:
        folder: `start_from`.
        config: what it says of its heads.
        settings: of the new run.
        drafts: per step, see `drafts_to_train`.
        trunk_layers: decoder layers of the base model.

    Raises:
        MTPError: the settings ask for another shape than that of the heads in `folder`.
    """
    where = f"`start_from` {folder}"
    layers = block_layers(config.blocks[0])
    if settings.layers is not None and settings.layers != layers:
        raise MTPError(
            f"{where} has heads of {layers} layer(s), and `layers` is {settings.layers}: leave `layers` out"
        )
    if settings.taps is not None and set(config.taps) - set(layer_numbers(settings.taps, trunk_layers)):
        own = ",".join([*map(str, config.taps), "last"])
        raise MTPError(
            f"{where} has heads that read {own}, and `taps` is {settings.taps}: leave `taps` out, or name these too"
        )
    if settings.taps is not None and settings.extend is not None:
        raise MTPError(f"{where} keeps its heads as they are when they are extended: leave `taps` out")
    if settings.extend is not None:
        if is_shared(config):
            raise MTPError(
                f"{where} has one head for all drafts, which `extend` would copy: to train it for more drafts, set "
                "`heads`"
            )
        return False
    shared = is_shared(config) if settings.shared is None else settings.shared
    if not shared and config.count != drafts:
        raise MTPError(
            f"{where} has {config.count} heads, and `heads` is {drafts}: set `heads` to {config.count}, or "
            "`extend` to get more"
        )
    return shared
