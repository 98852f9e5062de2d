"""Converts a GGUF model of type llama, qwen2 or qwen3 to an mlx-lm model folder.

The folder (config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json) is
written under a temporary name beside its destination and renamed at the end, so it is complete or absent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model, save_config, save_model

from mtp_mlx.convert.gguf.file import GGUFFile
from mtp_mlx.convert.gguf.plan import damage_reported, plan
from mtp_mlx.convert.gguf.weights import default_dtype, load_weights
from mtp_mlx.errors import ConversionError, MTPError
from mtp_mlx.files import check_out, new_folder

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def convert_gguf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    quantize: int | None = None,
    group_size: int = 64,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Convert the GGUF file `source` into the mlx-lm model folder `out` and return its path.

    Args:
        source: the file, or the first part of a model that was split; its other parts lie beside it.
        dtype: "float32", "bfloat16" or "float16"; by default float32 on CPU and bfloat16 with Metal.
        quantize: 4 or 8 bits, by mlx-lm's own quantiser; None for none.
        group_size: 32 or 64; layers whose width it does not divide stay in `dtype`.
        force: replace `out` if it is a model folder already.
        progress: called with each stage in a few words.

    Raises:
        FileNotFoundError: `source` is missing.
        ConversionError: a file that cannot be converted.
        MTPError: a setting that is not supported; `out` exists; a full disk.
    """
    source, out, tell = Path(source), Path(out), progress or (lambda _: None)
    _check_settings(dtype, quantize, group_size)
    check_free = partial(
        check_out, out, force=force, mark="config.json", kind="a model folder", source=source
    )
    check_free()
    tell("reading the header")
    planned = plan(source)
    gguf, config = planned.gguf, planned.config
    with damage_reported(gguf):
        tell("dequantising the weights")
        weights = load_weights(gguf, config, DTYPES[dtype] if dtype else default_dtype())
        model = _build_model(gguf, config, weights)
    if quantize:
        tell(f"quantising to {quantize} bits")
        with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints its bits per weight
            model, config = quantize_model(model, config, group_size, quantize)
    tell("writing")
    with new_folder(out) as folder:
        save_model(folder, model, donate_model=True)
        save_config(config, folder / "config.json")
        planned.tokenizer.save(str(folder / "tokenizer.json"))
        for name, value in planned.texts.items():
            _write_json(folder / name, value)
        check_free()  # another process may have been faster
    return out


def _check_settings(dtype: str | None, quantize: int | None, group_size: int) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise MTPError(f"`dtype` must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if quantize not in (None, 4, 8):
        raise MTPError(f"`quantize` must be 4 or 8 bits, not {quantize}")
    if group_size not in (32, 64):
        raise MTPError(f"`group_size` must be 32 or 64, not {group_size}")


def _build_model(gguf: GGUFFile, config: dict[str, Any], weights: dict[str, mx.array]) -> nn.Module:
    """mlx-lm's model holding `weights`; raises one ConversionError listing all that do not fit."""
    arch = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = arch.Model(arch.ModelArgs.from_dict(config))
    wanted = {name: value.shape for name, value in dict(tree_flatten(model.parameters())).items()}
    for name in wanted.keys() - weights.keys():
        if name.endswith(
            ".o_proj.bias"
        ):  # llama's attention_bias covers o as well; the file may lack that one
            weights[name] = mx.zeros(wanted[name], weights["model.norm.weight"].dtype)
    problems = [f"missing {name}" for name in sorted(wanted.keys() - weights.keys())]
    problems += [f"unexpected {name}" for name in sorted(weights.keys() - wanted.keys())]
    problems += [
        f"{name} is {weights[name].shape}, the metadata say {wanted[name]}"
        for name in sorted(wanted.keys() & weights.keys())
        if weights[name].shape != wanted[name]
    ]
    if problems:
        more = f" ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ConversionError(f"{gguf.path}: weights and metadata disagree: {'; '.join(problems[:8])}{more}.")
    model.load_weights(list(weights.items()))
    return model


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
