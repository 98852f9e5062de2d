"""Adapter folders on a model hub: `push` with a card that says what they are, `pull` into a folder that decodes.

huggingface_hub does everything on the network. Only the config, the weights and a generated card are pushed, nothing
else in the folder; the base's name in the config is replaced where it is a path on this machine.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from mtp_mlx.adapter_folder import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    Header,
    code_block,
    model_card,
    put_texts,
    read_header,
    read_tensors,
    tensor_sizes,
)
from mtp_mlx.config import option_name
from mtp_mlx.drafters.registry import card_lines, settings_class, training_methods
from mtp_mlx.errors import MTPError
from mtp_mlx.files import new_folder
from mtp_mlx.hub_errors import hub_errors
from mtp_mlx.models import EMBEDDED

FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
NOT_REPEATABLE = "The adapter does not record the settings that would repeat its training."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Description:
    """What the card says and the header does not.

    Attributes:
        base: hub id of the base model, or None if the header's own name is one (or an embedded model's).
        data: what the adapter was trained on, in words.
        license: the hub's identifier of a licence, or None to leave it out.
    """

    base: str | None = None
    data: str | None = None
    license: str | None = None


def hub_api() -> Any:
    """huggingface_hub's client, logged in as the user."""
    from huggingface_hub import HfApi

    return HfApi(library_name="mtp-mlx")


def is_repository(name: str) -> bool:
    """Whether `name` has the form of a repository's name, owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def check_repository(name: str) -> str:
    """`name`, if it can be the name of a repository.

    Raises:
        MTPError: if it is not of the form owner/name.
    """
    if not is_repository(name):
        raise MTPError(f"{name!r} is not a repository's name: give OWNER/NAME, as in someone/my-adapter")
    return name


def read_adapter(folder: Path) -> tuple[Header, dict[str, int]]:
    """The header of a whole adapter folder, and the sizes of its tensors by name.

    Raises:
        MTPError: if there is no adapter, a file is missing or damaged, or the base's fingerprint is not known.
    """
    if not folder.is_dir():
        raise MTPError(f"{folder} is not a folder: give an adapter folder, as `mtp-mlx train` writes it")
    header = read_header(folder)
    if header.base_fingerprint is None:
        raise MTPError(
            f"{folder / CONFIG_NAME} has no fingerprint of its base model, so nobody could check which model it goes "
            "with: convert it again beside its base"
        )
    return header, tensor_sizes(read_tensors(folder))


# --- the card -------------------------------------------------------------------------------------------------


def public_base(header: Header, given: str | None) -> str:
    """The name under which others can load the base model.

    Raises:
        MTPError: if the header has a path on this machine, and no hub id is given.
    """
    name = given or header.base_name
    if (_HUB_ID.fullmatch(name) and not Path(name).exists()) or name in EMBEDDED:
        return name
    raise MTPError(
        f"the adapter's base is called {name!r}, which nobody else can load: give `base` OWNER/NAME, the hub id "
        "that the base came from"
    )


def reproduce_command(header: Header) -> str | None:
    """The `mtp-mlx train` command with the settings that the adapter records; None if it records no known method."""
    training, method = header.training, header.training.get("method")
    if method not in training_methods() or not {"planned_steps", "learning_rate"} <= training.keys():
        return None
    values = {**training, "steps": training["planned_steps"], "model": header.base_name}
    words = []
    for field in fields(settings_class(method)):
        value, option = values.get(field.name), option_name(field.name)
        if value is None or (field.default is not MISSING and _plain(value) == _plain(field.default)):
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, list | tuple):
            words += [f"{option} {one}" for one in value]
        else:
            words.append(f"{option} {value}")
    return " ".join([f"mtp-mlx train {method} --data answers.jsonl --out adapter", *words])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def published(folder: Path, repository: str, description: Description) -> tuple[Header, str]:
    """The header and the card as others will read them.

    The card is the adapter's own with front matter for the hub, the data, and the commands to get it and to train it
    again.

    Raises:
        MTPError: as `read_adapter` and `public_base`.
    """
    header, sizes = read_adapter(folder)
    header = replace(header, base_name=public_base(header, description.base))
    lines, command = card_lines(folder, header), reproduce_command(header)
    sections = {
        **lines.sections,
        "Data": _data(header.training, description),
        "Reproduce": code_block(command) if command else NOT_REPEATABLE,
    }
    commands = (
        f"mtp-mlx pull {repository} --out adapter",
        f'mtp-mlx generate --model {header.base_name} --adapter adapter --prompt "..."',
    )
    title = repository.rpartition("/")[2]
    about = f"{lines.title}. It runs with that model only, which is checked by a fingerprint.\n{lines.about}"
    lines = replace(lines, title=title, about=about, sections=sections, commands=commands)
    return header, _front_matter(header, description) + model_card(header, lines, sizes)


def _front_matter(header: Header, description: Description) -> str:
    """What the hub reads of a card."""
    front: dict[str, Any] = {
        "library_name": "mtp-mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "mtp-mlx", "speculative-decoding"],
    }
    if header.base_name not in EMBEDDED:
        front |= {"base_model": header.base_name, "base_model_relation": "adapter"}
    if description.license:
        front["license"] = description.license
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"


def _data(training: dict[str, Any], description: Description) -> str:
    text = description.data or str(training.get("data") or "Not recorded.")
    if "examples" not in training:
        return text
    return (
        f"{text}\n\n{training['examples']} examples, fingerprint `{training.get('data_fingerprint', '?')}`."
    )


# --- to and from the hub --------------------------------------------------------------------------------------


def push(folder: Path, repository: str, description: Description, private: bool) -> str:
    """Uploads the adapter in `folder` to `repository`, creating it if need be; returns its address.

    Raises:
        MTPError: without an adapter, a login, access or a network; nothing is then half-published.
    """
    header, card = published(folder, check_repository(repository), description)
    with tempfile.TemporaryDirectory(prefix="mtp-mlx-") as temporary:
        staged = Path(temporary)
        shutil.copyfile(folder / WEIGHTS_NAME, staged / WEIGHTS_NAME)
        put_texts(staged, header, card)
        with hub_errors(f"{folder} could not be pushed to {repository}"):
            api = hub_api()
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository,
                folder_path=staged,
                allow_patterns=list(FILES),
                commit_message="Adapter for mtp-mlx",
            )
    return str(getattr(done, "repo_url", None) or repository)


def fetch_adapter(repository: str) -> Path:
    """The folder of the adapter in `repository`: the hub's own cache, which needs no network the next time.

    Raises:
        MTPError: without access or a network, if there is no such repository or no adapter in it.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    def folder(**where: Any) -> Path:
        return Path(hub_api().snapshot_download(repository, allow_patterns=list(FILES), **where))

    with hub_errors(f"the adapter {repository} could not be fetched"):
        try:
            found = folder(local_files_only=True)
            found = found if (found / CONFIG_NAME).is_file() else folder()
        except LocalEntryNotFoundError:
            found = folder()
    if not (found / CONFIG_NAME).is_file():
        raise MTPError(
            f"{repository} holds no adapter of mtp-mlx; if it holds MTP heads, name it with `heads` instead"
        )
    return found


def pull(repository: str, out: Path, revision: str | None = None) -> Header:
    """Downloads the adapter of `repository` into the folder `out`, whole or not at all; returns its header.

    Raises:
        MTPError: without access or a network, if there is no such repository or no adapter in it, or if `out` holds
            something else.
    """
    from mtp_mlx.train.trainer import check_out

    check_repository(repository)
    check_out(out)
    with hub_errors(f"{repository} could not be pulled"):
        found = Path(hub_api().snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    try:
        header, _ = read_adapter(found)
    except MTPError as error:
        raise MTPError(f"{repository} holds no adapter of mtp-mlx: {error}") from error
    with new_folder(out) as temporary:
        for name in FILES:
            if (found / name).is_file():
                shutil.copyfile(found / name, temporary / name)
    return header
