"""Options of a memory, for the command line and `load`, and the settings of `mtp-mlx remember`. Needs no mlx."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mtp_mlx.config import setting, trust_setting

OFF = "off"
DEFAULT_SIZE = "64MB"


@dataclass(frozen=True)
class MemoryLoading:
    """What a model may draft with beside its own drafter.

    Attributes:
        memory: a file of `mtp-mlx remember`; None for the one that comes with the model, if there is one, and "off"
            for none.
    """

    memory: str | None = setting(
        None, help="Draft from this file of mtp-mlx remember, or 'off' (default: the bundled one)"
    )


@dataclass(frozen=True)
class MemoryLearning:
    """Whether a memory learns while a model is used; for commands that answer people.

    Attributes:
        memory_learn: add the model's answers to the file.
    """

    memory_learn: bool = setting(False, help="Add the answers to the file of --memory")


@dataclass(frozen=True)
class RememberSettings:
    """Settings of `mtp-mlx remember`.

    Attributes:
        out: the file to make, or to add to.
        model: whose tokenizer the file is for.
        trust_remote_code: run the code that the tokenizer may come with.
        max_size: largest size of the file; None for the size that it has been limited to, or `DEFAULT_SIZE`.
    """

    out: Path = setting(help="File to make or to add to", flag="-o")
    model: str = setting("smollm2-135m", help="Embedded model, mlx-lm folder or hub id", flag="-m")
    trust_remote_code: bool = trust_setting()
    max_size: str | None = setting(None, help=f"Largest size of the file (default: {DEFAULT_SIZE})")


LOADING, LEARNING, REMEMBER = MemoryLoading, MemoryLearning, RememberSettings
