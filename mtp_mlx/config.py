"""Settings: a frozen dataclass defines every name, type, default and help text, once.

    @dataclass(frozen=True)
    class Training:
        model: str = setting(help="model folder or hub id")
        steps: int = setting(1000, help="optimizer steps", minimum=1)
        lora: LoRA = setting(LoRA(), help="adapter")          # a nested frozen dataclass

    @click.command()
    @click.option("--config", type=click.Path(path_type=Path))
    @options_for(Training)                                    # --model, --steps, --lora-rank
    def command(config, **options):
        settings = from_yaml(Training, config, options)       # dataclass < YAML < command line

An option that is not given is None and overrides nothing, so defaults exist in the dataclass only.
Field types: int, float, str, bool, Path, Literal[...], tuple[<one of these>, ...], X | None, and frozen dataclasses
(with or without a default, but not None).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import click
import yaml

from mtp_mlx.errors import MTPError

Config = TypeVar("Config")
Command = TypeVar("Command", bound=Callable[..., Any])

NESTED = "__"  # joins the names of nested fields in a click parameter: lora.rank is lora__rank


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    flag: str | None = None,
    old_option: str | None = None,
) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: its default; without one the setting is required, in YAML or as an option.
        help: help text of its option.
        minimum, maximum: inclusive bounds, or None.
        flag: short option, such as "-m".
        old_option: an earlier name of the option, which still works and is not shown in help.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "flag": flag, "old_option": old_option}
    return dataclasses.field(default=default, metadata=metadata)


def trust_setting() -> Any:
    """The setting `trust_remote_code`, which many verbs have."""
    return setting(False, help="Run code that comes with the model and its tokenizer")


def from_yaml(
    cls: type[Config], path: str | Path | None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """The settings in a YAML file, overridden by `overrides`.

    Args:
        cls: the frozen dataclass of the settings.
        path: a file with a YAML mapping, or None for the defaults.
        overrides: {field name: value}, the keyword arguments of a click command; nested fields as "lora__rank", None
            and () for options that are not given.

    Raises:
        MTPError: if the file is not a YAML mapping, a key is unknown (names the nearest known one), a value has a
            wrong type or is out of bounds, or a required setting is missing.
        TypeError: if `overrides` has a field that `cls` does not have.
    """
    values = {} if path is None else _read_yaml(Path(path))
    config = _checked(cls, values, str(path))
    for key, value in (overrides or {}).items():
        if value is None or value == ():
            continue
        *parents, name = key.split(NESTED)
        target, owner = config, cast(Any, cls)
        for parent in parents:
            owner = _hints(owner).get(parent)
            target = target.setdefault(parent, {})
        if not dataclasses.is_dataclass(owner) or name not in _hints(owner):
            raise TypeError(f"{cls.__name__} has no setting {key!r}")
        target[name] = _convert(value, _hints(owner)[name], _bounds(owner, name), option_name(key))
    return _build(cls, config, path)


def from_dict(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """The settings in a mapping; `where` names its source in errors. Raises as `from_yaml`."""
    return _build(cls, _checked(cls, values, where), where)


def to_dict(config: Any) -> dict[str, Any]:
    """A settings object as JSON and YAML types; the inverse of `from_dict`."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class _Loader(yaml.SafeLoader):
    """A SafeLoader that rejects duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} occurs twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise MTPError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except UnicodeDecodeError as error:
        raise MTPError(f"{path}: not UTF-8 at byte {error.start}. Save the file as UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise MTPError(f"{path}{line}: invalid YAML ({problem}). Fix this line.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise MTPError(f"{path}: must have lines of the form 'setting: value', but holds a {_name(values)}.")
    return values


def _checked(cls: Any, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` after checking keys and converting each to its field's type; nested dataclasses stay mappings."""
    hints = _hints(cls)
    checked = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known settings: {', '.join(hints)}."
            raise MTPError(f"{where}: unknown setting {str(key)!r}. {hint}")
        checked[key] = _convert(value, hints[key], _bounds(cls, key), f"{where}: {key}")
    return checked


def _build(cls: Any, values: Mapping[str, Any], source: Any) -> Any:
    """The dataclass with checked values; MTPError if a setting is missing or __post_init__ raises ValueError."""
    hints, given = _hints(cls), {}
    for field in dataclasses.fields(cls):
        if field.name in values:
            value = values[field.name]
            if dataclasses.is_dataclass(hints[field.name]) and isinstance(value, Mapping):
                value = _build(hints[field.name], _merged(_default(field), value), source)
            given[field.name] = value
        elif _required(field):
            written = f" or write it in {source}" if source else ""
            raise MTPError(f"{option_name(field.name)} is missing. Give the option{written}.")
    try:
        return cls(**given)
    except ValueError as error:
        raise MTPError(f"{source}: {error}" if source else str(error)) from error


def _merged(default: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a default dataclass (none if it is None), overridden by `values` at every depth."""
    fields = () if default is None else dataclasses.fields(default)
    merged: dict[str, Any] = {field.name: getattr(default, field.name) for field in fields}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and default is not None
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _bounds(cls: Any, name: str) -> tuple[float | None, float | None]:
    metadata = cls.__dataclass_fields__[name].metadata
    return metadata.get("minimum"), metadata.get("maximum")


def _required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _convert(value: Any, kind: Any, bounds: tuple[float | None, float | None], where: str) -> Any:
    """`value` as a `kind`; MTPError with `where`, the expected type or bound and the value if that fails."""
    kind, optional = _unwrap(kind)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return _checked(kind, value, where)
        raise _mismatch(where, "a mapping of settings", value)
    if get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)):
            items = enumerate(value)
            return tuple(_convert(item, get_args(kind)[0], bounds, f"{where}[{i}]") for i, item in items)
        raise _mismatch(where, "a list", value)
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if value == choice or value == str(choice):  # click gives strings
                return choice
        near = difflib.get_close_matches(str(value), [str(choice) for choice in get_args(kind)], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise MTPError(f"{where} must be one of {', '.join(map(str, get_args(kind)))}, not {value!r}.{hint}")
    return _within(_scalar(value, kind, where), bounds, where)


def _unwrap(kind: Any) -> tuple[Any, bool]:
    """(X, True) for X | None, (kind, False) otherwise."""
    if get_origin(kind) in (Union, types.UnionType):
        inner = [arm for arm in get_args(kind) if arm is not type(None)]
        return inner[0], True
    return kind, False


def _scalar(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, str):  # YAML reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            raise _mismatch(where, "a number", value) from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    expected = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    raise _mismatch(where, expected.get(kind, kind.__name__), value)


def _within(value: Any, bounds: tuple[float | None, float | None], where: str) -> Any:
    minimum, maximum = bounds
    if minimum is not None and not value >= minimum:
        raise MTPError(f"{where} must be at least {minimum:g}, not {value}.")
    if maximum is not None and not value <= maximum:
        raise MTPError(f"{where} must be at most {maximum:g}, not {value}.")
    return value


def _mismatch(where: str, expected: str, value: Any) -> MTPError:
    return MTPError(f"{where} must be {expected}, not {value!r} ({_name(value)}).")


def _name(value: Any) -> str:
    names = {
        dict: "mapping",
        list: "list",
        str: "text",
        bool: "true or false",
        int: "whole number",
        float: "number",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def option_name(key: str) -> str:
    """The command-line option of a field: "lora__rank" -> "--lora-rank"."""
    return "--" + key.replace(NESTED, "-").replace("_", "-")


def options_for(cls: type) -> Callable[[Command], Command]:
    """A decorator that adds a click option for every field of `cls`, including nested ones, in field order.

    An option that is not given is None (or () for lists) and so overrides nothing in `from_yaml`.
    """

    def decorate(command: Command) -> Command:
        for key, kind, field, default in reversed(list(_leaves(cls))):
            command = _option(key, kind, field, default)(command)
        return command

    return decorate


def _leaves(cls: Any, prefix: str = "", defaults: Any = None) -> Iterator[tuple[str, Any, Any, Any]]:
    """(parameter name, type, field, default) of every setting that is not itself a dataclass."""
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _leaves(hints[field.name], f"{prefix}{field.name}{NESTED}", default)
        else:
            yield f"{prefix}{field.name}", hints[field.name], field, default


def _option(key: str, kind: Any, field: Any, default: Any) -> Callable[[Command], Command]:
    kind, _ = _unwrap(kind)
    name = option_name(key)
    multiple = get_origin(kind) is tuple
    kind = get_args(kind)[0] if multiple else kind
    declared = f"{name}/--no-{name[2:]}" if kind is bool else name
    names = [declared, key] if not field.metadata.get("flag") else [field.metadata["flag"], declared, key]
    old_option = field.metadata.get("old_option")
    names += [old_option] if old_option else []
    if get_origin(kind) is Literal:
        kind = click.Choice([str(choice) for choice in get_args(kind)])
    elif kind is Path:
        kind = click.Path(path_type=Path)
    return click.option(
        *names,
        cls=RenamedOption if old_option else click.Option,
        type=kind,
        multiple=multiple,
        default=None,
        show_default=_shown(default),
        help=field.metadata.get("help"),
    )


class RenamedOption(click.Option):
    """An option whose last name is an older one, which still works but is not shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """See click."""
        with self._without_old_name():
            return super().get_help_record(ctx)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """See click."""
        with self._without_old_name():
            return super().get_error_hint(ctx)

    @contextmanager
    def _without_old_name(self) -> Iterator[None]:
        names, self.opts = self.opts, self.opts[:-1]
        try:
            yield
        finally:
            self.opts = names


def _shown(default: Any) -> str | bool:
    if default is None or default == ():
        return False
    if isinstance(default, bool):
        return "on" if default else "off"
    return ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
