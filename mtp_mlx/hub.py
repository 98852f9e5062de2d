"""Adapter folders on a model hub: `push` with a card that says what they are, `pull` into a folder that decodes.

Everything on the network is huggingface_hub's. What is pushed is config, weights and a generated card, nothing else
of the folder; the config's name of the base is replaced where it would tell a path of this machine.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from mtp_mlx.adapter_folder import CONFIG_NAME, WEIGHTS_NAME, read_config, read_tensors
from mtp_mlx.config import option_name
from mtp_mlx.drafters.registry import settings_class, training_methods
from mtp_mlx.errors import MTPError
from mtp_mlx.files import new_folder
from mtp_mlx.models import EMBEDDED

CARD_NAME = "README.md"
FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
METHODS = {
    "mask-tokens": ("gated-LoRA mask tokens", "2507.11851"),
    "conf-adapt": ("one mask token by online self-distillation, gated LoRA", "2602.06019"),
    "mtp-heads": ("MTP heads", "2603.23911"),
    "ptp": ("Parallel Token Prediction", "2512.21323"),
}
NOT_REPEATABLE = "The adapter does not record settings that a command repeats."
CARD = """---
{front}
---

# {title}

Drafts for {base}, so that it writes several tokens per forward pass with mtp-mlx. Drafts are verified: the text is
the base model's own. It runs with that model only, which is checked by a fingerprint.

## Base

{base}, fingerprint `{fingerprint}`

## Method

{method}

## Data

{data}

## Measured acceptance

Share of drafts accepted, given that those before were, on held-out text:

{measured}

## Reproduce

{again}

## Use

```
mtp-mlx pull {repository} --out adapter
mtp-mlx generate --model {base} --adapter adapter --prompt "..."
```
"""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Description:
    """What a card says and the config does not.

    Attributes:
        base: hub id of the base model, or None where the config's own name is one (or an embedded model's).
        data: what the adapter was trained on, in words.
        license: identifier for the hub, or None to leave it open.
    """

    base: str | None = None
    data: str | None = None
    license: str | None = None


def hub_api() -> Any:
    """huggingface_hub's client, with the user's own login."""
    from huggingface_hub import HfApi

    return HfApi(library_name="mtp-mlx")


def check_repository(name: str) -> str:
    """`name`, if it can be a repository's.

    Raises:
        MTPError: it is not of the form owner/name.
    """
    if not _HUB_ID.fullmatch(name):
        raise MTPError(f"{name!r} is no repository: give OWNER/NAME, as in someone/my-adapter")
    return name


def read_adapter(folder: Path) -> dict[str, Any]:
    """The config of a whole adapter folder.

    Raises:
        MTPError: it is not one: the config or the weights are missing or damaged.
    """
    if not folder.is_dir():
        raise MTPError(f"{folder} is not a folder: give an adapter folder, as `mtp-mlx train` writes it")
    config = read_config(folder)
    base = config.get("base")
    if not isinstance(base, dict) or not all(
        isinstance(base.get(key), str) for key in ("name", "fingerprint")
    ):
        raise MTPError(f"{folder / CONFIG_NAME} is damaged: it names no base model")
    read_tensors(folder)
    return config


# --- the card -------------------------------------------------------------------------------------------------


def public_base(config: dict[str, Any], given: str | None) -> str:
    """The name of the base that a reader elsewhere can use.

    Raises:
        MTPError: the config has a path of this machine, and no hub id was given.
    """
    name = given or str(config["base"]["name"])
    if _HUB_ID.fullmatch(name) and not Path(name).exists() or name in EMBEDDED:
        return name
    raise MTPError(
        f"the adapter's base is called {name!r}, which nobody else can load: give --base OWNER/NAME, the hub id "
        "that the base came from"
    )


def reproduce_command(config: dict[str, Any], base: str) -> str | None:
    """The `mtp-mlx train` command with the settings that the adapter records; None if it records no known method."""
    training = config.get("training", {})
    method = training.get("method")
    if method not in training_methods() or not {"planned_steps", "learning_rate"} <= training.keys():
        return None
    known = {field.name: field for field in fields(settings_class(method))}
    values = {**training, "steps": training["planned_steps"], "model": base}
    words = []
    for name, field in known.items():
        value = values.get(name)
        if value is None or (field.default is not MISSING and _plain(value) == _plain(field.default)):
            continue
        if isinstance(value, bool):
            words.append(option_name(name) if value else f"--no-{option_name(name)[2:]}")
        elif isinstance(value, list | tuple):
            words += [f"{option_name(name)} {one}" for one in value]
        else:
            words.append(f"{option_name(name)} {value}")
    return " ".join([f"mtp-mlx train {method} --data answers.jsonl --out adapter", *words])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def hub_card(config: dict[str, Any], repository: str, description: Description) -> str:
    """The repository's README: front matter, base, method, data, measured acceptance, commands.

    Raises:
        MTPError: as `public_base`.
    """
    base, training = public_base(config, description.base), config.get("training", {})
    front: dict[str, Any] = {
        "library_name": "mtp-mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "mtp-mlx", "speculative-decoding"],
    }
    if base not in EMBEDDED:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    if description.license:
        front["license"] = description.license
    command = reproduce_command(config, base)
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        title=repository.rpartition("/")[2],
        repository=repository,
        base=base,
        fingerprint=config["base"]["fingerprint"],
        method=_method(config),
        data=_data(training, description),
        measured=_measured(config.get("acceptance") or []),
        again=f"```\n{command}\n```" if command else NOT_REPEATABLE,
    )


def _method(config: dict[str, Any]) -> str:
    """Its name, with the paper."""
    name = str(config.get("training", {}).get("method", config.get("method")))
    if name not in METHODS:
        return name
    words, paper = METHODS[name]
    return f"{words} ([arXiv {paper}](https://arxiv.org/abs/{paper}))"


def _data(training: dict[str, Any], description: Description) -> str:
    text = description.data or str(training.get("data") or "Not said by whoever published this.")
    if "examples" not in training:
        return text
    return (
        f"{text}\n\n{training['examples']} examples, fingerprint `{training.get('data_fingerprint', '?')}`."
    )


def _measured(acceptance: list[float]) -> str:
    """A table by depth."""
    if not acceptance:
        return "Not measured."
    rows = (f"| {depth} | {value:.2f} |" for depth, value in enumerate(acceptance, 1))
    return "\n".join(["| draft | accepted |", "|---|---|", *rows])


# --- to and from the hub --------------------------------------------------------------------------------------


def push(folder: Path, repository: str, description: Description, private: bool) -> str:
    """Uploads the adapter in `folder` to `repository`, which is made if need be; returns its address.

    Raises:
        MTPError: no adapter there, no such login, no access, or no network; nothing is then half-published.
    """
    config = read_adapter(folder)
    card = hub_card(config, check_repository(repository), description)
    config = {**config, "base": {**config["base"], "name": public_base(config, description.base)}}
    with tempfile.TemporaryDirectory(prefix="mtp-mlx-") as temporary:
        staged = Path(temporary)
        shutil.copyfile(folder / WEIGHTS_NAME, staged / WEIGHTS_NAME)
        (staged / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (staged / CARD_NAME).write_text(card, encoding="utf-8")
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


def pull(repository: str, out: Path, revision: str | None = None) -> dict[str, Any]:
    """Downloads the adapter of `repository` into the folder `out`, whole or not at all; returns its config.

    Raises:
        MTPError: no such repository, no access, no network, no adapter in it, or `out` is something else.
    """
    from mtp_mlx.train.trainer import check_out

    check_repository(repository)
    check_out(out)
    with hub_errors(f"{repository} could not be pulled"):
        found = Path(hub_api().snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    try:
        config = read_adapter(found)
    except MTPError as error:
        raise MTPError(f"{repository} holds no adapter of mtp-mlx: {error}") from error
    with new_folder(out) as temporary:
        for name in FILES:
            if (found / name).is_file():
                shutil.copyfile(found / name, temporary / name)
    return config


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns what huggingface_hub and the network raise into one sentence.

    Raises:
        MTPError: always the way out: log in, check the name, get access, or a network.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise MTPError(f"{what}: that is no repository's name; give OWNER/NAME") from error
    except errors.LocalTokenNotFoundError as error:
        raise MTPError(f"{what}: you are not logged in; run `hf auth login` first") from error
    except errors.GatedRepoError as error:
        raise MTPError(f"{what}: access to it must be asked for on its page first") from error
    except errors.RevisionNotFoundError as error:
        raise MTPError(f"{what}: it has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise MTPError(
            f"{what}: there is no such repository, or it is private and you have no access; check the name, and run "
            "`hf auth login` if it is yours"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise MTPError(
            f"{what}: the hub cannot be reached, and nothing of it is in the local cache"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise MTPError(
                f"{what}: your login does not allow it ({status}); run `hf auth login` with a token that may write"
            ) from error
        raise MTPError(f"{what}: the hub answered {status or 'with an error'} ({_short(error)})") from error
    except OSError as error:  # a network error of the client library, a full disk
        raise MTPError(f"{what}: {_short(error)}") from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise MTPError(f"{what}: the hub cannot be reached ({_short(error)})") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
