"""Options of `mtp-mlx train`: a method's own where its command is named, else those of all methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

from mtp_mlx.config import from_yaml, setting
from mtp_mlx.drafters.registry import settings_class, training_methods
from mtp_mlx.errors import MTPError
from mtp_mlx.train.settings import TrainSettings

METHODS = training_methods()
SETTINGS = {
    method: frozenset(field.name for field in dataclasses.fields(settings_class(method)))
    for method in METHODS
}
# Names of the settings that all methods read, and of those that only some do.
SHARED = frozenset(field.name for field in dataclasses.fields(TrainSettings))
OF_SOME_METHODS = frozenset().union(*SETTINGS.values()) - SHARED


def _every_setting() -> type:
    """A dataclass of `method` and the settings of all methods, as one YAML file may hold them."""
    method = setting(None, help=f"Training method, if none is named as a command (default: {METHODS[0]})")
    fields = {"method": ("method", Literal[METHODS] | None, method)}
    for cls in map(settings_class, METHODS):
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            copied = setting(field.default, **field.metadata)
            fields.setdefault(field.name, (field.name, hints[field.name], copied))
    return dataclasses.make_dataclass("EverySetting", fields.values(), frozen=True, kw_only=True)


EverySetting: Any = _every_setting()


def settings_from(
    config: Path | None, options: Mapping[str, Any], command: str | None = None
) -> TrainSettings:
    """The settings of a run: those of a YAML file, with the options given on top.

    Args:
        command: the method that the command line names, if any; else that of `--method` or the file.

    Raises:
        MTPError: as `from_yaml`, and for another method's settings, unless they are at their defaults.
    """
    given: Any = from_yaml(EverySetting, config, options)
    if command and given.method not in (None, command):
        raise MTPError(f"`method` is {given.method}, and the command trains {command}")
    method = command or given.method or METHODS[0]
    foreign = [
        f"`{field.name}` ({getattr(given, field.name)}) is a setting of {readers(field.name)}, not of {method}"
        for field in dataclasses.fields(EverySetting)
        if field.name in OF_SOME_METHODS - SETTINGS[method] and getattr(given, field.name) != field.default
    ]
    if foreign:
        raise MTPError("; ".join(foreign))
    return settings_class(method)(**{name: getattr(given, name) for name in SETTINGS[method]})


def readers(name: str) -> str:
    """Methods that read the setting `name`, as in "a, b and c"."""
    *most, last = (method for method in METHODS if name in SETTINGS[method])
    return f"{', '.join(most)} and {last}" if most else last
