"""Proves that no metadata key that changes numbers is dropped in silence, and that yarn's are carried over exactly.

The keys are those of llama.cpp's package `gguf`; the oracle for yarn's logits is plain numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mtp_mlx.convert.gguf.config import build_config
from mtp_mlx.convert.gguf.file import GGUFFile
from mtp_mlx.convert.gguf.keys import ANY_ARCHITECTURE, NO_EFFECT, OF_ARCHITECTURE
from mtp_mlx.convert.gguf.model import convert_gguf
from mtp_mlx.convert.gguf.parts import read_gguf
from mtp_mlx.convert.gguf.plan import damage_reported, plan
from mtp_mlx.errors import ConversionError
from tests.convert.gguf.gguf_files import HEAD_DIM, write_model
from tests.convert.gguf.test_gguf import FREQS, assert_logits_equal
from tests.convert.heads.numpy_model import logits

YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 1024,
}
IDS = [9, 33, 2, 150, 7, 8, 8, 91]


def keys_of(part: type = gguf.constants.Keys) -> Iterator[str]:
    """Every metadata key that the package `gguf` knows."""
    for name, value in vars(part).items():
        if isinstance(value, type):
            yield from keys_of(value)
        elif isinstance(value, str) and not name.startswith("__"):
            yield value


def names(prefix: str) -> list[str]:
    """Keys with this prefix, for a llama."""
    keys = {key.format(arch="llama", name="tool_use", dense="dense_2", id=0) for key in keys_of()}
    return sorted(key for key in keys if key.startswith(prefix))


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    """A model with yarn's scaling, in which the keys of all kinds of scaling could have an effect."""
    return read_gguf(write_model(tmp_path_factory.mktemp("keys") / "m.gguf", metadata=YARN).path)


@pytest.mark.parametrize("key", names("llama."))
@pytest.mark.parametrize("value", [3, 0.37, "strange", [0.5, 2.5]], ids=str)
def test_every_key_of_the_architecture_counts(header: GGUFFile, key: str, value: Any) -> None:
    """An odd value is refused or changes config.json, unless the list says that nothing reads the key."""
    suffix = key.removeprefix("llama.")
    changed = replace(header, metadata=header.metadata | {key: value})
    if OF_ARCHITECTURE.get(suffix) == NO_EFFECT:
        assert build_config(changed) == build_config(header)
        assert suffix in WITHOUT_EFFECT or suffix.startswith("expert")
        return
    try:
        with damage_reported(changed):
            config = build_config(changed)
    except ConversionError:
        return
    assert config != build_config(header)


WITHOUT_EFFECT = {
    *("rope.scaling.finetuned", "tensor_data_layout"),
    *("leading_dense_block_count", "interleave_moe_layer_step"),
}


def test_the_list_has_no_key_that_llama_cpp_does_not_have() -> None:
    known = {key.removeprefix("llama.") for key in names("llama.")}
    older_or_newer = {"rope.scale_linear", "rope.freq_scale", "attention.value_scale", "hidden_activation"}
    assert OF_ARCHITECTURE.keys() - known == older_or_newer
    known = set(names("tokenizer.")) | set(names("general."))
    others = {key for key in ANY_ARCHITECTURE if key not in known}
    assert others == OLLAMA | NEWER


OLLAMA = {
    f"tokenizer.ggml.{key}"
    for key in ("eos_token_ids", "add_padding_token", "add_mask_token", "add_unknown_token")
}
NEWER = {
    f"tokenizer.ggml.{key}"
    for key in ("cls_token_id", "normalizer.lowercase", "normalizer.strip_accents", "suppress_tokens")
}
NEWER |= {"tokenizer.chat_template.*"}

REFUSED: dict[str, Any] = {
    "llama.attention.scale": 0.5,
    "llama.attention.output_scale": 0.5,
    "llama.attention.causal": False,
    "llama.attention.clamp_kqv": 8.0,
    "llama.attention.max_alibi_bias": 8.0,
    "llama.attention.sliding_window": 128,
    "llama.attention.temperature_length": 8192,
    "llama.attention.q_lora_rank": 64,
    "llama.logit_scale": 0.0625,
    "llama.embedding_scale": 12.0,
    "llama.residual_scale": 0.22,
    "llama.attn_logit_softcapping": 50.0,
    "llama.final_logit_softcapping": 30.0,
    "llama.rope.scaling.attn_factor": 1.19,
    "llama.rope.scaling.alpha": 1000.0,
    "llama.rope.scaling.yarn_ext_factor": 0.5,
    "llama.rope.scaling.yarn_attn_factor": 0.8,
    "llama.rope.scaling.yarn_log_multiplier": 0.1,
    "llama.rope.freq_base_swa": 10000.0,
    "llama.rope.dimension_sections": [16, 24, 24, 0],
    "llama.pooling_type": 3,
    "llama.classifier.output_labels": ["yes", "no"],
    "llama.nextn_predict_layers": 1,
    "llama.use_parallel_residual": True,
    "llama.hidden_activation": "gelu",
    "llama.ssm.conv_kernel": 4,
    "llama.a_key_of_next_year": 1,
    "general.quantization_version": 1,
    "tokenizer.ggml.add_eos_token": True,
    "tokenizer.ggml.remove_extra_whitespaces": True,
    "tokenizer.ggml.suppress_tokens": [0],
    "tokenizer.ggml.a_key_of_next_year": "x",
    "xielu.beta": 0.5,
    "diffusion.shift_logits": True,
}


@pytest.mark.parametrize("key", list(REFUSED))
def test_what_mlx_lm_cannot_express_is_refused_by_name(tmp_path: Path, key: str) -> None:
    written = write_model(tmp_path / "m.gguf", metadata={key: REFUSED[key]})
    with pytest.raises(
        ConversionError, match=rf"{key} is .*Use the model's safetensors checkpoint instead\.$"
    ):
        convert_gguf(written.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_all_of_them_are_named_at_once(tmp_path: Path) -> None:
    metadata = {"llama.logit_scale": 0.25, "llama.attention.scale": 0.5}
    with pytest.raises(
        ConversionError, match=r"llama\.logit_scale is 0\.25; llama\.attention\.scale is 0\.5\."
    ):
        plan(write_model(tmp_path / "m.gguf", metadata=metadata).path)


HARMLESS: dict[str, Any] = {
    "general.name": "Tiny",
    "general.type": "model",
    "general.quantization_version": 2,
    "general.sampling.temp": 0.7,
    "quantize.imatrix.file": "imatrix.dat",
    "llama.attention.scale": HEAD_DIM**-0.5,
    "llama.attention.key_length": HEAD_DIM,
    "llama.attention.causal": True,
    "llama.attention.sliding_window": 512,
    "llama.attention.max_alibi_bias": 0.0,
    "llama.attention.temperature_length": 0,
    "llama.logit_scale": 1.0,
    "llama.residual_scale": 0.0,
    "llama.final_logit_softcapping": 0.0,
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.pooling_type": 0,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.rope.scaling.finetuned": True,
    "llama.rope.scaling.attn_factor": 1.0,
    "llama.rope.scaling.yarn_ext_factor": -1.0,
    "llama.rope.scaling.yarn_log_multiplier": 0.0,
    "llama.tensor_data_layout": "Meta AI original pth",
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.chat_template.tool_use": "{{ messages }}",
}


def test_values_with_which_nothing_changes_are_fine(tmp_path: Path) -> None:
    plain = plan(write_model(tmp_path / "a.gguf").path)
    assert plan(write_model(tmp_path / "b.gguf", metadata=HARMLESS).path).config == plain.config


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("adapter", "a LoRA adapter"),
        ("mmproj", "an image or audio encoder"),
        ("imatrix", "an importance matrix"),
    ],
)
def test_files_that_are_no_models_are_told_what_they_are(tmp_path: Path, kind: str, message: str) -> None:
    path = write_model(tmp_path / "m.gguf", metadata={"general.type": kind}).path
    with pytest.raises(ConversionError, match=f"this is {message} for llama.cpp, not a model"):
        plan(path)


# --- rope scaling -------------------------------------------------------------------------------------------


def yarn_freqs(factor: float, original: int, fast: float, slow: float) -> np.ndarray:
    """(hd / 2,) as in YaRN (arXiv 2309.00071, section 3.2): frequencies between the two limits are mixed."""
    where = [
        HEAD_DIM * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(50000))
        for turns in (fast, slow)
    ]
    low, high = max(math.floor(where[0]), 0), min(math.ceil(where[1]), HEAD_DIM - 1)
    kept = 1 - np.clip((np.arange(HEAD_DIM // 2) - low) / max(high - low, 0.001), 0, 1)
    return FREQS * kept + FREQS / factor * (1 - kept)


@pytest.mark.parametrize("betas", [(), (4.0, 0.25)])
def test_logits_with_yarn(tmp_path: Path, betas: tuple[float, ...]) -> None:
    names = ("llama.rope.scaling.yarn_beta_fast", "llama.rope.scaling.yarn_beta_slow")
    fast, slow = betas or (32.0, 1.0)
    freqs, length = yarn_freqs(4.0, 1024, fast, slow), 0.1 * math.log(4) + 1
    if betas:
        assert not np.allclose(freqs, yarn_freqs(4.0, 1024, 32.0, 1.0))
    metadata = YARN | dict(zip(names, betas)) | {"llama.rope.scaling.yarn_attn_factor": length}
    written = write_model(tmp_path / "m.gguf", seed=5, metadata=metadata)
    assert_logits_equal(written.path, tmp_path, logits(written.arrays, "llama", IDS, freqs, length), IDS)
    scaling = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert ("beta_fast" in scaling) == bool(betas)


ODD_SCALING = [
    ({"type": "longrope"}, "'longrope' is not supported"),
    ({"type": "yarn", "factor": 4.0}, "original_context_length' is missing"),
    ({"factor": -2.0}, r"scaled by a factor of -2\.0"),
    ({"factor": math.nan}, "scaled by a factor of nan"),
    ({"factor": math.inf}, "scaled by a factor of inf"),
    ({"factor": "two"}, "scaled by a factor of 'two'"),
]


@pytest.mark.parametrize(("values", "message"), ODD_SCALING, ids=str)
def test_odd_scaling_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    metadata = {f"llama.rope.scaling.{key}": value for key, value in values.items()}
    with pytest.raises(ConversionError, match=message):
        plan(write_model(tmp_path / "m.gguf", metadata=metadata).path)


def test_rope_factors_and_scaling_at_once_are_refused(tmp_path: Path) -> None:
    """llama.cpp applies both; one of them would be lost."""
    extra = {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    path = write_model(tmp_path / "m.gguf", extra=extra, metadata={"llama.rope.scaling.factor": 4.0}).path
    with pytest.raises(
        ConversionError, match=r"it scales rope twice, by rope_freqs\.weight and by llama\.rope"
    ):
        plan(path)


def test_rope_factors_belong_to_llamas(tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    plan(write_model(tmp_path / "llama.gguf", extra=extra).path)
    for arch in ("qwen2", "qwen3"):
        path = write_model(tmp_path / f"{arch}.gguf", arch, extra=extra).path
        with pytest.raises(
            ConversionError, match=rf"have no place in a dense {arch} model: rope_freqs\.weight"
        ):
            plan(path)


def test_rope_factors_of_another_shape_are_refused(tmp_path: Path) -> None:
    for shape in ((1,), (HEAD_DIM,), (HEAD_DIM // 2, 1)):
        extra = {"rope_freqs.weight": np.ones(shape, np.float32)}
        path = write_model(tmp_path / f"{len(shape)}{shape[0]}.gguf", extra=extra).path
        with pytest.raises(ConversionError, match=r"rope_freqs\.weight should be F32 of shape \[8\]"):
            plan(path)
