"""What damages a model, rows, an adapter or a prompt cache: the edits of `damage.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

from mtp_mlx.drafters.masks.folder import mask_header, save
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.model.naive import random_adapter
from tests.tiny import CHAT_TEMPLATE, hf_tokenizer, save_tiny, tiny_model

Edit = Callable[[Path], object]


def bench(root: Path) -> Path:
    """Puts an undamaged `model` folder and undamaged `rows.jsonl` into `root`."""
    save_tiny(root / "model", "qwen3", seed=3)
    write_rows({"prompt": "print(1)", "response": "the fox"})(root / "rows.jsonl")
    return root


def nothing(_: Path) -> None:
    """For damaged options."""


def config(**values: Any) -> Edit:
    """Sets fields of config.json; `...` deletes one."""

    def edit(model: Path) -> None:
        old = json.loads((model / "config.json").read_text())
        new = {key: value for key, value in {**old, **values}.items() if value is not ...}
        (model / "config.json").write_text(json.dumps(new))

    return edit


def holds(name: str, content: str | bytes) -> Edit:
    """Gives a file this content."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda model: (model / name).write_bytes(raw)


def lacks(*names: str) -> Edit:
    """Deletes files."""
    return lambda model: [(model / name).unlink() for name in names]


def cut(name: str) -> Edit:
    """Cuts off the end of a file."""
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:-200])


def tensors(change: Callable[[dict[str, mx.array]], object]) -> Edit:
    """Changes the weights."""

    def edit(model: Path) -> None:
        file = model / "model.safetensors"
        weights = dict(mx.load(str(file)))
        mx.eval(weights)
        change(weights)
        mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})

    return edit


def tokenizer_config(**values: Any) -> Edit:
    """Sets fields of tokenizer_config.json."""

    def edit(model: Path) -> None:
        file = model / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit


def template(text: str) -> Edit:
    """Gives the model this chat template."""
    return lambda model: hf_tokenizer(chat_template=text).save_pretrained(model)


def more_tokens(model: Path) -> None:
    """A tokenizer with one token more than the embedding has rows; its chat template uses it."""
    tokenizer = hf_tokenizer(chat_template="<extra>" + CHAT_TEMPLATE)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)


def in_shards(model: Path) -> None:
    """Weights in two files, the second of which is missing."""
    weights = dict(mx.load(str(model / "model.safetensors")))
    names = sorted(weights)
    mx.eval(weights)
    (model / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    mx.save_safetensors(str(model / files[0]), {name: weights[name] for name in names[::2]})
    index = {name: files[place % 2] for place, name in enumerate(names)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def only_torch(model: Path) -> None:
    """Weights of PyTorch alone."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def write_rows(*rows: Any) -> Edit:
    """Rows of JSON."""
    return lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rows_text(text: str) -> Edit:
    """A file of rows with this content."""
    return lambda file: file.write_text(text)


def answer(message: Any) -> Edit:
    """A chat whose last message is this."""
    return write_rows({"messages": [{"role": "user", "content": "the"}, message]})


def chat(**message: Any) -> Edit:
    """A chat whose first message has these fields."""
    last = {"role": "assistant", "content": "the fox"}
    return write_rows({"messages": [{"role": "user", **message}, last]})


def folder_with(**files: Any) -> Edit:
    """A folder with JSON files of these names."""

    def edit(folder: Path) -> None:
        folder.mkdir()
        for name, value in files.items():
            (folder / f"{name}.json").write_text(json.dumps(value))

    return edit


def another_model(folder: Path) -> None:
    """A copy of the model."""
    shutil.copytree(folder.parent / "model", folder)


def drafts_beyond(folder: Path) -> None:
    """An adapter whose draft vocabulary has an id that the model has no row for."""
    model = tiny_model("qwen3", seed=3)
    adapter = random_adapter(model, draft_ids=mx.array([3, 5, 8], dtype=mx.int32))
    save(folder, adapter, mask_header(adapter.config, "tiny", base_fingerprint(model)))
    weights = dict(mx.load(str(folder / "mtp.safetensors")))
    mx.eval(weights)
    weights["draft_ids"] = mx.array([3, 5, 999999], dtype=mx.int32)
    mx.save_safetensors(str(folder / "mtp.safetensors"), weights)


def another(architecture: str, **config: Any) -> Edit:
    """Another model in the model's place."""

    def edit(model: Path) -> None:
        shutil.rmtree(model)
        save_tiny(model, architecture, seed=3, **config)

    return edit


def cache_of(architecture: str, **config: Any) -> Edit:
    """A prompt cache that such a model has filled."""

    def edit(file: Path) -> None:
        model = tiny_model(architecture, seed=3, **config)
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([[5, 6, 7, 8]]), cache=cache))
        save_prompt_cache(str(file), cache)

    return edit


def other_states(file: Path) -> None:
    """A model with recurrent layers, and a prompt cache of one whose layers are wider."""
    another("qwen3_next")(file.parent / "model")
    cache_of("qwen3_next", linear_key_head_dim=12)(file)


def no_layers(file: Path) -> None:
    """A prompt cache without layers."""
    save_prompt_cache(str(file), [])


# --- the list ---------------------------------------------------------------------------------------------------
