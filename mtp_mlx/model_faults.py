"""What is wrong with a model folder that cannot be loaded or run, and how to mend it, as the end of a sentence.

Nothing here refuses a model that works: except for the two files that are read first (`read_config`), a fault is
looked for only after mlx-lm or transformers has failed, to say more than their error does.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import mlx.core as mx
from mlx_lm.utils import _get_classes

from mtp_mlx.errors import MTPError
from mtp_mlx.jsonl import type_name

# Files from which transformers makes a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
_TOKENIZER_CONFIGS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Fields of a config that cannot be zero or less in any model.
_POSITIVE = (
    *("hidden_size", "intermediate_size", "vocab_size", "head_dim"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
_POINTER = "is only a pointer of Git LFS to the file: run `git lfs pull` in the model's folder"
_LONGEST = 200  # characters of another library's message


def short(error: object) -> str:
    """Another library's message on one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} ..."


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder.

    Raises:
        MTPError: if it is not a model's config, or `generation_config.json` beside it holds something else.
    """
    config = _read_object(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.exists():
        _read_object(generation, broken_is_fine=True)  # as in mlx-lm
    kind = config.get("model_type")
    if not isinstance(kind, str):
        found = "has no model_type" if kind is None else f"has the model_type {kind!r}, which is no text"
        raise MTPError(f"{folder / 'config.json'} {found}: take the file from the original model")
    return config


def _read_object(path: Path, broken_is_fine: bool = False) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MTPError(f"it has no {path.name}, so it is no model that mlx-lm can load") from error
    except OSError as error:
        raise MTPError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, RecursionError) as error:
        if broken_is_fine:
            return {}
        if _is_pointer(path):
            raise MTPError(f"{path} {_POINTER}") from error
        raise MTPError(
            f"{path} is not JSON ({short(error)}): take the file from the original model"
        ) from error
    if not isinstance(value, dict):
        raise MTPError(
            f"{path} holds a {type_name(value)}, not an object: take the file from the original model"
        )
    return value


# --- the model ----------------------------------------------------------------------------------------------


def model_fault(folder: Path, config: dict[str, Any], error: BaseException) -> str:
    """Why mlx-lm raised `error` for a model folder with this config."""
    if _asks_for_trust(error):
        return f"it runs code of its own ({config.get('model_file')}): {_TRUST}"
    return (
        _type_fault(config)
        or _file_fault(folder)
        or _config_fault(config)
        or _quantisation_fault(config, error)
        or _tensor_fault(folder, str(error))
        or f"{_mlx_lm()} cannot load it ({type(error).__name__}: {short(error)}): compare config.json and the "
        "weights with the original model's"
    )


_TRUST = "give `trust_remote_code` if you trust its makers, or choose another model"


def _asks_for_trust(error: object) -> bool:
    """Whether mlx-lm or transformers refused to run code that lies in the folder."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def _mlx_lm() -> str:
    return f"mlx-lm {importlib.metadata.version('mlx-lm')}"


def holds_heads_alone(model_type: object) -> bool:
    """Whether a folder of this model type has heads split from their model, as by mlx-vlm, or an assistant of one."""
    return isinstance(model_type, str) and model_type.endswith(("_mtp", "_assistant"))


def _type_fault(config: dict[str, Any]) -> str | None:
    """Whether mlx-lm has no such model."""
    if config.get("model_file") is not None:  # builds it, whatever its type
        return None
    try:
        _get_classes(config)
    except (ValueError, AttributeError):  # no such module, or one that is not a model's
        kind = config["model_type"]
        if holds_heads_alone(kind):
            if kind.endswith("_assistant"):
                return (
                    "it is the assistant of a model: name it with `heads`, and the model itself with `model`"
                )
            return "it holds MTP heads alone: name them with `heads`, and the model that they are for with `model`"
        return f"{_mlx_lm()} has no model type {kind!r}: update mlx-lm, or choose another model"
    except SystemExit:  # olmo's module ends the program, after a line that names a package
        kind = config["model_type"]
        return f"{_mlx_lm()} needs one more package for the model type {kind!r}: install what its line above names"
    return None


def _file_fault(folder: Path) -> str | None:
    """Whether weight files are missing or damaged."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        return _no_weights(folder)
    for file in files:
        try:
            mx.load(str(file))  # lazily: the header and the length
        except (OSError, RuntimeError, ValueError) as error:
            if _is_pointer(file):
                return f"{file.name} {_POINTER}"
            return f"{file.name} is cut off or damaged ({short(error)}): get it again"
    missing = sorted({name for name in _index(folder).values() if not (folder / name).exists()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"{missing[0]}{more} of model.safetensors.index.json is missing: get the model again"
    return None


def _is_pointer(path: Path) -> bool:
    """Whether git was not told to get the file itself."""
    with path.open("rb") as file:
        return file.read(24) == b"version https://git-lfs."


def _no_weights(folder: Path) -> str:
    others = [
        path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".gguf")
    ]
    if others:
        source = folder / sorted(others)[0] if all(name.endswith(".gguf") for name in others) else folder
        return (
            f"it has no model*.safetensors, only {sorted(others)[0]}: convert it first with "
            f"`mtp-mlx convert {source} OUT`, then use OUT"
        )
    return "it has no weights (model*.safetensors): get the model again"


def _index(folder: Path) -> dict[str, str]:
    """{tensor: file} as the index of the shards has it; empty without one."""
    try:
        found = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))[
            "weight_map"
        ]
        return {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _quantisation_fault(config: dict[str, Any], error: BaseException) -> str | None:
    """Whether the weights are quantised in a way that mlx-lm does not read."""
    ours = "quantization" in config
    key, needed = (
        ("quantization", ("group_size", "bits")) if ours else ("quantization_config", ("quant_method",))
    )
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, dict):
        return f'config.json: "{key}" is {value!r}, an object expected: take it from the original model'
    missing = [name for name in needed if name not in value]
    if missing:
        return f'config.json: "{key}" has no "{missing[0]}": take it from the original model'
    if ours:
        return None
    reason = (
        f" ({short(error)})" if isinstance(error, ValueError) else ""
    )  # others are slips of mlx-lm's code
    return (
        f"its weights are quantised by {str(value['quant_method']).upper()} in a form that {_mlx_lm()} cannot read"
        f"{reason}: take the unquantised model and quantise it with `mlx_lm.convert -q`"
    )


def _config_fault(config: dict[str, Any]) -> str | None:
    """The first field of the config that is missing, of the wrong type, or impossible."""
    _, arguments = _get_classes(config)
    try:
        hints = get_type_hints(arguments)
        fields = dataclasses.fields(arguments)
    except (TypeError, NameError):
        return None
    for field in fields:
        if field.name not in config:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                return f'config.json has no "{field.name}": take the file from the original model'
            continue
        value = config[field.name]
        if not _fits(value, hints[field.name]) and not (value is None and field.default is None):
            return (
                f'config.json: "{field.name}" is {short(json.dumps(value))}, {_kinds(hints[field.name])} expected: '
                "take it from the original model"
            )
        if field.name in _POSITIVE and type(value) is int and value <= 0:
            return (
                f'config.json: "{field.name}" is {value}, which no model has: take it from the original model'
            )
    return None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON can be of the type; True for types that cannot be checked here."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    kind = get_origin(hint) or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (list, tuple):
        return isinstance(value, list)
    if kind in (bool, str, dict, type(None)):
        return isinstance(value, kind)
    return True


def _kinds(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_kinds(one) for one in get_args(hint))
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        dict: "an object",
        list: "a list",
        tuple: "a list",
        type(None): "null",
    }
    return names.get(get_origin(hint) or hint, str(hint))


def _tensor_fault(folder: Path, message: str) -> str | None:
    """What mlx says of tensors that do not fit the config, in other words."""
    again = "the files are not those of one model, or config.json was changed: get the model again"
    counted = re.match(r"(Missing|Received) (\d+) parameters[^:]*:\s*([^,\s]+?)\.?(,|\s|$)", message)
    if counted:
        missing, count, first = counted[1] == "Missing", int(counted[2]), counted[3]
        tensors = f"{first}" if count == 1 else f"{first} and {count - 1} more"
        lack = f"its weights lack {tensors}" if missing else f"config.json has no place for {tensors}"
        return f"{lack}: {again}"
    shapes = re.match(r"Expected shape (\(.*?\)) but received shape (\(.*?\)) for parameter (\S+)", message)
    if shapes:
        return f"{shapes[3]} is {shapes[2]}, {shapes[1]} expected by config.json: {again}"
    return None


# --- the tokenizer ------------------------------------------------------------------------------------------


def tokenizer_fault(folder: Path, error: Exception | None) -> str:
    """Why the tokenizer of a model folder cannot be loaded; `error` is None if it has no tokens."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES) and not any(folder.glob("*.tiktoken")):
        return "it has no tokenizer: copy tokenizer.json and tokenizer_config.json from the original model"
    for name in _TOKENIZER_CONFIGS:
        if (folder / name).exists():
            try:
                _read_object(folder / name)
            except MTPError as damaged:
                return str(damaged)
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("mlx_lm."):
        *_, kind, name = str(error.name).split(".")
        asked = {"tool_parsers": "tool_parser_type", "chat_templates": "chat_template_type"}.get(kind, kind)
        return (
            f'tokenizer_config.json: "{asked}" is "{name}", which {_mlx_lm()} does not have: update mlx-lm, or '
            "delete the line"
        )
    if type(error).__name__ == "StrictDataclassFieldValidationError":  # transformers reads config.json too
        return f"transformers refuses config.json ({short(error)}): take it from the original model"
    if _asks_for_trust(error):
        return f"its tokenizer runs code of its own: {_TRUST}"
    reason = "it has no tokens" if error is None else f"{type(error).__name__}: {short(error)}"
    return f"its tokenizer cannot be loaded ({reason}): take the tokenizer's files from the original model"


def ends_fault(tokenizer: Any) -> str | None:
    """Whether ids that end a text are no ids."""
    wrong = [token for token in tokenizer.eos_token_ids if type(token) is not int or token < 0]
    if not wrong:
        return None
    return (
        f'"eos_token_id" in config.json or generation_config.json is {wrong[0]!r}, a token id or a list of them '
        "expected: take it from the original model"
    )
