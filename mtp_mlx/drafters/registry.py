"""The list of all drafters, one line each. A drafter's room is imported on first use, so `--help` does not load mlx.

The rest of the package finds these names in a room `mtp_mlx/drafters/<room>/`:

    options.py   needs no mlx    LOADING: dataclass of its options for `load` and the command line
                                 TRAINS: {training method: `mtp_mlx.train.settings.Trains`}
    folder.py    if adapters     load(folder, header, model) -> (DraftSource, `Header`)
                                 facts(folder, header) -> the method's section, for `mtp-mlx info`
                                 card_lines(folder, header) -> `CardLines`
    loading.py   if LOADING      prepare(source, options, context) -> DraftSource | None
                                 if beside: open_texts(options, learning, context) -> TextSource | None,
                                 with options.LEARNING: dataclass of its options in chat and serve
    remember.py  if beside       remember(settings, on_tokens) -> what was learnt; settings: options.REMEMBER
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from mtp_mlx.adapter_folder import WEIGHTS_NAME, CardLines, Header, damage, read_header
from mtp_mlx.errors import MTPError
from mtp_mlx.token_ids import check_ids
from mtp_mlx.train.settings import Trains, TrainSettings

if TYPE_CHECKING:
    from mtp_mlx.train.method import Method


@dataclass(frozen=True)
class Room:
    """One drafter.

    Attributes:
        name: its folder in `mtp_mlx/drafters`.
        drafts: the name of its drafts in the `drafter` argument and in statistics; rooms may share a name.
        needs: what a model needs to use it, as the end of an error message.
        adapters: the values of `method` in `mtp_config.json` for which it reads the folder.
        trains: the methods it trains, as in `mtp-mlx train METHOD`.
        loads: whether `load` and the command line have options for it (`options.LOADING`).
        instead: whether its options replace an adapter that was found rather than named.
        chained: whether its drafts are made after the pass; otherwise they come from slot rows of the pass.
        beside: whether it drafts from text alone, beside the drafter that a model has (`TextSource`).
    """

    name: str
    drafts: str
    needs: str
    adapters: tuple[str, ...] = ()
    trains: tuple[str, ...] = ()
    loads: bool = False
    instead: bool = False
    chained: bool = False
    beside: bool = False

    def module(self, name: str) -> Any:
        """The room's module `name`."""
        return importlib.import_module(f"mtp_mlx.drafters.{self.name}.{name}")


@dataclass(frozen=True)
class LoadContext:
    """What a drafter may need to know while a model is loaded.

    Attributes:
        model, tokenizer: the bare base model and its tokenizer.
        adapter_named: whether the user named the adapter, rather than `load` finding it.
        texts: a file that comes with the model for a drafter from text (`Room.beside`), or None.
        trust_remote_code: whether models may run code that they come with.
    """

    model: Any
    tokenizer: Any
    adapter_named: bool
    texts: Path | None = None
    trust_remote_code: bool = False


_SLOTS = "an adapter with slots: name one with `adapter`"
_HEADS = "MTP heads: name them with `heads`, or their folder with `adapter`"
_MODEL = "a draft model: name it with `draft_model`"
_ASSISTANT = "the assistant of a Gemma 4 model: name it with `heads`"

ROOMS = (
    Room("masks", "slots", _SLOTS, adapters=("mask-tokens",), trains=("mask-tokens", "conf-adapt")),
    Room("heads", "heads", _HEADS, ("mtp-heads",), ("mtp-heads",), loads=True, chained=True),
    Room("ptp", "slots", _SLOTS, adapters=("ptp",), trains=("ptp",)),
    Room("draft_model", "draft-model", _MODEL, loads=True, instead=True, chained=True),
    Room("gemma4_assistant", "assistant", _ASSISTANT, adapters=("gemma4-assistant",), chained=True),
    Room("memory", "memory", "a file of `mtp-mlx remember`: name it with `memory`", loads=True, beside=True),
)


def drafter_names() -> dict[str, str]:
    """{name of a drafter: what a model needs to use it}."""
    return {room.drafts: room.needs for room in ROOMS}


def is_chained(method: object) -> bool:
    """Whether adapters of this `method` draft after the pass; False for an unknown method."""
    return any(room.chained and method in room.adapters for room in ROOMS)


def load_folder(folder: Path, model: Any) -> tuple[Any, Header]:
    """Loads an adapter folder for a bare model: its `DraftSource` and header.

    Raises:
        MTPError: if there is no adapter, its method is unknown, it belongs to another base model, or it is damaged.
    """
    header = read_header(folder)
    with damage(folder):
        source, header = _format(folder, header).load(folder, header, model)
    check_draft_ids(folder, source.draft_ids, model)
    return source, header


def check_draft_ids(folder: Path, draft_ids: Any, model: Any) -> None:
    """Raises MTPError for a draft vocabulary that is damaged: MLX would read beyond the model's head for it."""
    from mtp_mlx.model.seams import embedding_rows

    rows = embedding_rows(model)
    if draft_ids is None or rows is None:
        return
    what = f"{folder / WEIGHTS_NAME} is damaged: its draft vocabulary"
    if draft_ids.ndim != 1 or not draft_ids.size or "int" not in str(draft_ids.dtype):
        raise MTPError(f"{what} is no list of token ids")
    check_ids(draft_ids.tolist(), rows, what)


def folder_facts(folder: Path, header: Header) -> dict[str, Any]:
    """The method's own section of the header of `folder`, for `mtp-mlx info`.

    Raises:
        MTPError: if the method is unknown, or the section is damaged.
    """
    return _format(folder, header).facts(folder, header)


def card_lines(folder: Path, header: Header) -> CardLines:
    """What the method of an adapter folder adds to its model card.

    Raises:
        MTPError: if the method is unknown, or the section is damaged.
    """
    with damage(folder):
        return _format(folder, header).card_lines(folder, header)


def _format(folder: Path, header: Header) -> Any:
    """The module `folder` of the room that reads this adapter."""
    for room in ROOMS:
        if header.method in room.adapters:
            return room.module("folder")
    known = ", ".join(f"'{name}'" for room in ROOMS for name in room.adapters)
    raise MTPError(
        f"the adapter {folder} has the method '{header.method}', which this version of mtp-mlx does not know; it "
        f"knows {known}"
    )


def loading_options() -> dict[str, Any]:
    """{room: dataclass of its options for `load`}; needs no mlx."""
    return {room.name: room.module("options").LOADING for room in ROOMS if room.loads}


def loading_block() -> type:
    """A frozen dataclass of all drafters' options for `load`; needs no mlx."""
    given = [field for kind in loading_options().values() for field in dataclasses.fields(kind)]
    kinds = {name: hint for kind in loading_options().values() for name, hint in get_type_hints(kind).items()}
    fields = [
        (field.name, kinds[field.name], dataclasses.field(default=field.default, metadata=field.metadata))
        for field in given
    ]
    return dataclasses.make_dataclass("LoadingOptions", fields, frozen=True)


def replaces_adapter(options: Mapping[str, Any]) -> bool:
    """Whether the options of `load` name a drafter that replaces an adapter found for the model."""
    kinds = loading_options()
    own = [name for room in ROOMS if room.instead for name in kinds[room.name].__dataclass_fields__]
    return any(options.get(name) is not None for name in own)


def prepare(source: Any, options: Mapping[str, Any], context: LoadContext) -> Any:
    """Applies the drafters' options of `load` and returns the `DraftSource` to use.

    Args:
        source: that of the adapter folder, or None.
        options: {argument of `load`: value}; None means not given.
        context: what else `load` knows.

    Raises:
        MTPError: if an argument is unknown, or cannot be combined with the source or with another argument.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known = {name: room for room, kind in loading_options().items() for name in kind.__dataclass_fields__}
    for name in given:
        if name not in {**known, **learning_block().__dataclass_fields__}:
            raise MTPError(f"`load` has no argument `{name}`; drafters take {', '.join(sorted(known))}")
    for room in ROOMS:
        own = {name: value for name, value in given.items() if known.get(name) == room.name}
        if own and not room.beside:
            source = room.module("loading").prepare(source, room.module("options").LOADING(**own), context)
    return source


def open_texts(options: Mapping[str, Any], context: LoadContext) -> Any:
    """The `TextSource` that the options of `load` name, or None.

    Raises:
        MTPError: if it cannot be read, or belongs to another tokenizer.
    """
    room = _remembering()
    given = {name: value for name, value in options.items() if value is not None}
    loading, learning = (
        kind(**{name: given[name] for name in kind.__dataclass_fields__ if name in given})
        for kind in (room.module("options").LOADING, learning_block())
    )
    return room.module("loading").open_texts(loading, learning, context)


def learning_block() -> Any:
    """A frozen dataclass of the options of drafters that learn while they are used; needs no mlx."""
    return _remembering().module("options").LEARNING


def remember_settings() -> type:
    """The settings of `mtp-mlx remember`; loads no mlx."""
    settings: type = _remembering().module("options").REMEMBER
    return settings


def remember(settings: Any, **options: Any) -> Any:
    """Learns texts, as `mtp-mlx remember`; arguments, result and errors as of the room's `remember`."""
    return _remembering().module("remember").remember(settings, **options)


def _remembering() -> Room:
    return next(room for room in ROOMS if room.beside)


def training_methods() -> tuple[str, ...]:
    """Names of the training methods; the first is the default of `mtp-mlx train`."""
    return tuple(name for room in ROOMS for name in room.trains)


def trains(method: str) -> Trains:
    """The declaration of a training method; loads no mlx.

    Raises:
        MTPError: if there is no such method.
    """
    trained: Trains = _training_room(method).module("options").TRAINS[method]
    return trained


def settings_class(method: str) -> type[TrainSettings]:
    """The settings of a training method; loads no mlx.

    Raises:
        MTPError: if there is no such method.
    """
    return trains(method).settings


def method_class(method: str) -> type[Method[Any]]:
    """The class that implements a training method.

    Raises:
        MTPError: if there is no such method.
    """
    module, _, name = trains(method).method.partition(":")
    found: type[Method[Any]] = getattr(_training_room(method).module(module), name)
    return found


def _training_room(method: str) -> Room:
    for room in ROOMS:
        if method in room.trains:
            return room
    raise MTPError(f"no training method {method!r}: choose one of {', '.join(training_methods())}")
