"""Everything about a GGUF model except its weights, checked: what a conversion would write. Needs no mlx."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mtp_mlx.convert.gguf.config import build_config, generation_config
from mtp_mlx.convert.gguf.file import GGUFFile
from mtp_mlx.convert.gguf.names import check_tensors
from mtp_mlx.convert.gguf.parts import read_gguf
from mtp_mlx.convert.gguf.tokenizer import build_tokenizer, tokenizer_config
from mtp_mlx.convert.gguf.vocabulary import stop_ids, tokens_of
from mtp_mlx.errors import ConversionError, MTPError


@dataclass(frozen=True)
class Plan:
    """What becomes of a GGUF model: `config` is config.json, `texts` are further JSON files by name."""

    gguf: GGUFFile
    config: dict[str, Any]
    tokenizer: Tokenizer
    texts: dict[str, dict[str, Any]]

    @property
    def ends(self) -> list[str]:
        """The tokens that end generation."""
        tokens = tokens_of(self.gguf)
        return [tokens[i] for i in stop_ids(self.gguf)]


def plan(path: str | Path) -> Plan:
    """The plan for the model in the GGUF file at `path`, or in the parts of which it is the first.

    Raises FileNotFoundError, or ConversionError: a file that cannot be converted.
    """
    gguf = read_gguf(path)
    with damage_reported(gguf):
        config = build_config(gguf)
        check_tensors(gguf)
        tokenizer = build_tokenizer(gguf)
        texts = {
            "tokenizer_config.json": tokenizer_config(gguf),
            "generation_config.json": generation_config(gguf),
        }
    return Plan(gguf, config, tokenizer, texts)


@contextlib.contextmanager
def damage_reported(gguf: GGUFFile) -> Iterator[None]:
    """Raises ConversionError if the block fails because the metadata are not what it takes them for."""
    try:
        yield
    except (MTPError, OSError, MemoryError):
        raise
    except Exception as error:  # the tokenizers package raises a bare Exception for merges that do not fit
        reason = " ".join(str(error).split())[:200]
        raise ConversionError(
            f"{gguf.path}: its metadata does not describe a model and its tokenizer ({type(error).__name__}: "
            f"{reason}). Get the file again."
        ) from error
