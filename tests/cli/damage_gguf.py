"""Damaged GGUF files for `test_damaged_inputs.py`, written by llama.cpp's package `gguf` with its own key names.

An entry's edit gets the place of the file, whose name says whether it is a part of a split model.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.cli.damage import READERS, Damage
from tests.cli.damage_edits import Edit
from tests.convert.gguf.gguf_files import TOKENS, add_metadata, default_metadata, finish, write_model

SPLIT = "model-0000{}-of-00003.gguf"
HEADERS = (*READERS["gguf"], "info of a file")  # what reads the header alone notices these too
WEIGHTS = ("convert", "convert to 4 bits")  # what nobody notices before the weights are read
N = len(TOKENS)


def written(**values: Any) -> Edit:
    """A model in one file, or in three parts if its name says so; `values` as in `write_model`."""

    def edit(path: Path) -> None:
        if path.name == "model.gguf":
            write_model(path, **values)
            return
        write_model(path.with_name("model.gguf"), split_max_tensors=7, **values)
        assert path.is_file()

    return edit


def with_keys(**values: Any) -> Edit:
    """Metadata of a llama, under "llama."; two underscores stand for a point."""
    return written(metadata={f"llama.{key.replace('__', '.')}": value for key, value in values.items()})


def with_ggml(**values: Any) -> Edit:
    """Metadata of the tokenizer, under "tokenizer.ggml."."""
    return written(metadata={f"tokenizer.ggml.{key}": value for key, value in values.items()})


def bytes_changed(old: bytes, new: bytes) -> Edit:
    """A model in which these bytes are others."""

    def edit(path: Path) -> None:
        write_model(path)
        raw = path.read_bytes()
        assert old in raw
        path.write_bytes(raw.replace(old, new))

    return edit


def cut(n_bytes: int) -> Edit:
    """A model whose last bytes are missing; of a split one, of its last part."""

    def edit(path: Path) -> None:
        written()(path)
        last = max(path.parent.glob("*.gguf"))
        last.write_bytes(last.read_bytes()[:-n_bytes])

    return edit


def without(*parts: int) -> Edit:
    """A split model without some of its parts."""

    def edit(path: Path) -> None:
        written()(path)
        for part in parts:
            path.with_name(SPLIT.format(part)).unlink()

    return edit


def swapped(path: Path) -> None:
    """A split model whose second part is the third once more."""
    written()(path)
    shutil.copy(path.with_name(SPLIT.format(3)), path.with_name(SPLIT.format(2)))


def renamed(path: Path) -> None:
    """The first part of a split model under another name."""
    written()(path.with_name(SPLIT.format(1)))
    path.with_name(SPLIT.format(1)).rename(path)


def piece(path: Path) -> None:
    """The first half of a file that was cut by size."""
    write_model(path.with_name("model.gguf"))
    path.with_name("model.gguf").rename(path)


def one_tensor(kind: str, n_bytes: int) -> Edit:
    """A model with a tensor of a type that no one reads."""

    def edit(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        add_metadata(writer, default_metadata("llama") | {"llama.block_count": 1})
        raw = np.zeros((N, n_bytes), dtype=np.uint8)
        writer.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        finish(writer)

    return edit


def gguf_damage(name: str, edit: Edit, says: str, *verbs: str, given: str = "model.gguf") -> Damage:
    """An entry for a GGUF file."""
    return Damage(name, "gguf", edit, says, verbs=verbs, given=given)


TWICE = "the vocabulary contradicts itself"
ONES = np.ones(8, np.float32)
GGUF_DAMAGES = [
    # the file
    gguf_damage("GGUF empty", Path.touch, "not a GGUF file", *HEADERS),
    gguf_damage("GGUF a text", lambda path: path.write_text("GGUF?"), "the file is truncated", *HEADERS),
    gguf_damage("GGUF missing", lambda path: None, "no such file", "convert", "convert plan"),
    gguf_damage("GGUF of version 1", bytes_changed(b"GGUF\x03", b"GGUF\x01"), "version 1 is not", *HEADERS),
    gguf_damage("GGUF cut in the weights", cut(60), "the file is truncated", *HEADERS),
    gguf_damage("GGUF cut in the header", cut(150_000), "the file is truncated", *HEADERS),
    gguf_damage(
        "GGUF with garbled tokens",
        bytes_changed("Ã©".encode(), b"\xc3\xff\xc2\xa9"),
        "tokenizer.ggml.tokens' holds text that is not UTF-8",
        *HEADERS,
    ),
    # split models
    gguf_damage(
        "GGUF later part",
        written(),
        f"give the first part, {SPLIT.format(1)}",
        *HEADERS,
        given=SPLIT.format(2),
    ),
    gguf_damage(
        "GGUF part alone",
        without(1, 3),
        f"give the first part, {SPLIT.format(1)}",
        *HEADERS,
        given=SPLIT.format(2),
    ),
    gguf_damage(
        "GGUF part missing",
        without(3),
        f"1 of which is missing beside it: {SPLIT.format(3)}",
        *HEADERS,
        given=SPLIT.format(1),
    ),
    gguf_damage(
        "GGUF parts missing",
        without(2, 3),
        "2 of which are missing beside it",
        *HEADERS,
        given=SPLIT.format(1),
    ),
    gguf_damage(
        "GGUF part cut off",
        cut(60),
        f"{SPLIT.format(3)}: the file is truncated",
        *HEADERS,
        given=SPLIT.format(1),
    ),
    gguf_damage(
        "GGUF part of another place",
        swapped,
        "its name says part 2 of 3, its metadata say part 3",
        *HEADERS,
        given=SPLIT.format(1),
    ),
    gguf_damage(
        "GGUF part renamed",
        renamed,
        "its name does not end in -00001-of-00003.gguf",
        *HEADERS,
        given="tiny.gguf",
    ),
    gguf_damage(
        "GGUF cut by size",
        piece,
        "a piece of a .gguf file that was cut by size",
        *HEADERS,
        given="model.gguf.part1of2",
    ),
    # the model
    gguf_damage(
        "GGUF of a mamba",
        written(metadata={"general.architecture": "mamba"}),
        "architecture 'mamba' is not supported",
    ),
    gguf_damage(
        "GGUF adapter", written(metadata={"general.type": "adapter"}), "this is a LoRA adapter for llama.cpp"
    ),
    gguf_damage("GGUF without layers", with_keys(block_count=None), "'llama.block_count' is missing"),
    gguf_damage("GGUF heads 0", with_keys(attention__head_count=0), "does not describe a model"),
    gguf_damage("GGUF experts", with_keys(expert_count=8), "a mixture of experts"),
    gguf_damage("GGUF attention scale", with_keys(attention__scale=0.5), "llama.attention.scale is 0.5"),
    gguf_damage("GGUF logit scale", with_keys(logit_scale=0.25), "llama.logit_scale is 0.25"),
    gguf_damage("GGUF pooling", with_keys(pooling_type=3), "llama.pooling_type is 3"),
    gguf_damage("GGUF unknown key", with_keys(frob=1), "llama.frob is 1"),
    gguf_damage(
        "GGUF yarn's attention",
        with_keys(
            rope__scaling__type="yarn",
            rope__scaling__factor=4.0,
            rope__scaling__original_context_length=128,
            rope__scaling__yarn_attn_factor=0.5,
        ),
        "llama.rope.scaling.yarn_attn_factor is 0.5",
    ),
    gguf_damage("GGUF longrope", with_keys(rope__scaling__type="longrope"), "'longrope' is not supported"),
    gguf_damage("GGUF factor below 0", with_keys(rope__scaling__factor=-2.0), "by a factor of -2.0"),
    gguf_damage(
        "GGUF rope scaled twice",
        written(metadata={"llama.rope.scaling.factor": 2.0}, extra={"rope_freqs.weight": ONES}),
        "it scales rope twice",
    ),
    gguf_damage(
        "GGUF tensor missing",
        written(leave_out=("blk.1.ffn_up.weight",)),
        "missing model.layers.1.mlp.up",
        *WEIGHTS,
    ),
    gguf_damage(
        "GGUF tensor unknown", written(extra={"blk.0.ssm_in.weight": ONES}), "1 tensors have no place"
    ),
    gguf_damage("GGUF widths", with_keys(feed_forward_length=128), "the metadata say", *WEIGHTS),
    gguf_damage("GGUF of ternary weights", one_tensor("TQ1_0", 54), "unsupported type: TQ1_0"),
    # the vocabulary
    gguf_damage("GGUF of WordPiece", with_ggml(model="bert"), "a 'bert' vocabulary is not supported"),
    gguf_damage(
        "GGUF cut by unknown rules", with_ggml(pre="martian"), "the pre-tokenizer 'martian' is not known"
    ),
    gguf_damage(
        "GGUF eos beyond", with_ggml(eos_token_id=10**6), f"{TWICE}: tokenizer.ggml.eos_token_id is 1000000"
    ),
    gguf_damage(
        "GGUF padding beyond", with_ggml(padding_token_id=N), f"{TWICE}: tokenizer.ggml.padding_token_id is"
    ),
    gguf_damage(
        "GGUF bos of no token", with_ggml(bos_token_id=None, add_bos_token=True), f"{TWICE}: text begins"
    ),
    gguf_damage(
        "GGUF types too few", with_ggml(token_type=[1] * 5), f"{TWICE}: {N} tokens, but 5 token types"
    ),
    gguf_damage("GGUF scores too few", with_ggml(scores=[0.5] * 5), f"{TWICE}: {N} tokens, but 5 scores"),
    gguf_damage(
        "GGUF tokens twice", with_ggml(tokens=[*TOKENS[:-1], TOKENS[9]]), f"{TWICE}: the tokens 9 and {N - 1}"
    ),
    gguf_damage(
        "GGUF merges of no tokens", with_ggml(merges=["no such"]), f"{TWICE}: the merge 'no such' needs"
    ),
    gguf_damage("GGUF size of the vocabulary", with_keys(vocab_size=7), f"{TWICE}: llama.vocab_size is 7"),
    gguf_damage("GGUF without tokens", with_ggml(tokens=None), "'tokenizer.ggml.tokens' is missing"),
    gguf_damage(
        "GGUF embedding too short",
        written(leave_out=("token_embd.weight",), extra={"token_embd.weight": np.ones((5, 64), np.float32)}),
        f"{N} tokens but only 5 rows of embeddings",
    ),
]
