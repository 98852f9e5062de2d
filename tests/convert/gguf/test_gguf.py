"""Proves that a converted GGUF model has gguf's own weights, the file's configuration and the right logits.

The files are written by llama.cpp's `gguf` package; the oracle for logits is plain numpy in GGUF's row order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mtp_mlx.convert.gguf.model import convert_gguf
from mtp_mlx.convert.gguf.parts import read_gguf
from mtp_mlx.convert.gguf.rope import llama3_divisors
from mtp_mlx.errors import ConversionError, MTPError
from tests.convert.gguf.gguf_files import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, TOKENS, finish, write_model
from tests.convert.heads.numpy_model import logits

THETA = 50000.0
FREQS = THETA ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def hf_name(name: str) -> str:
    """GGUF's name of a tensor -> Hugging Face's."""
    *layer, stem, suffix = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{NAMES[stem]}.{suffix}"


def hf_rows(name: str, value: np.ndarray, arch: str) -> np.ndarray:
    """Rows of q and k of a llama in Hugging Face's order, row by row: even rows first, odd rows after."""
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
    if arch != "llama" or heads is None:
        return value
    out = np.empty_like(value)
    for head in range(heads):
        for i in range(HEAD_DIM // 2):
            out[head * HEAD_DIM + i] = value[head * HEAD_DIM + 2 * i]
            out[head * HEAD_DIM + HEAD_DIM // 2 + i] = value[head * HEAD_DIM + 2 * i + 1]
    return out


def config_of(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_weights_are_exactly_those_gguf_dequantises(tmp_path: Path, arch: str, kind: str) -> None:
    bias = kind == "F16" and arch != "qwen3"  # which has none
    written = write_model(tmp_path / "m.gguf", arch, kind, tied=kind != "Q8_0", bias=bias)
    folder = convert_gguf(written.path, tmp_path / "out", dtype="float32")
    loaded = mx.load(str(folder / "model.safetensors"))
    expected = {hf_name(name): hf_rows(name, value, arch) for name, value in written.arrays.items()}
    zeros = {name for name in loaded if name.endswith("o_proj.bias")}  # mlx-lm's attention_bias wants them
    assert loaded.keys() - zeros == expected.keys()
    assert bool(zeros) == (arch == "llama" and kind == "F16")
    assert all(not np.array(loaded[name]).any() for name in zeros)
    for name, value in expected.items():
        assert loaded[name].dtype == mx.float32
        np.testing.assert_array_equal(np.array(loaded[name]), value, err_msg=name)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_numpys(tmp_path: Path, arch: str, tied: bool) -> None:
    written = write_model(tmp_path / "m.gguf", arch, "F32", seed=5, tied=tied)
    ids = [3, 77, 12, 200, 5, 5, 91]
    assert_logits_equal(written.path, tmp_path, logits(written.arrays, arch, ids, FREQS), ids)


def test_logits_with_llama3_rope_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    divisors = llama3_divisors(THETA, HEAD_DIM, scaling)
    assert divisors[0] == 1 and divisors[-1] == 8 and len(set(divisors)) >= 3  # all three regimes
    written = write_model(tmp_path / "m.gguf", extra={"rope_freqs.weight": divisors.astype(np.float32)})
    ids = [9, 33, 2, 150]
    folder = assert_logits_equal(
        written.path, tmp_path, logits(written.arrays, "llama", ids, FREQS / divisors), ids
    )
    assert config_of(folder)["rope_scaling"] == scaling


def test_logits_with_linear_rope_scaling(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    written = write_model(tmp_path / "m.gguf", metadata=metadata)
    ids = [9, 33, 2, 150]
    assert_logits_equal(written.path, tmp_path, logits(written.arrays, "llama", ids, FREQS / 4), ids)


def assert_logits_equal(path: Path, tmp_path: Path, expected: np.ndarray, ids: list[int]) -> Path:
    """Convert, load through mlx-lm, compare all logits; returns the folder."""
    folder = convert_gguf(path, tmp_path / "out", dtype="float32")
    model, _ = mlx_lm.load(str(folder))
    found = np.array(model(mx.array([ids]))[0])
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)
    return folder


def test_config_is_the_files(tmp_path: Path) -> None:
    written = write_model(tmp_path / "m.gguf", tied=False)
    folder = convert_gguf(written.path, tmp_path / "out", dtype="bfloat16")
    expected = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": THETA,
        "vocab_size": len(TOKENS),
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
    assert expected.items() <= config_of(folder).items()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    weights = mx.load(str(folder / "model.safetensors"))
    assert {value.dtype for value in weights.values()} == {mx.bfloat16}


def test_quantised_folder_loads(tmp_path: Path) -> None:
    written = write_model(tmp_path / "m.gguf", kind="Q8_0")
    folder = convert_gguf(written.path, tmp_path / "out", dtype="float32", quantize=8, group_size=32)
    model, _ = mlx_lm.load(str(folder))
    assert config_of(folder)["quantization"]["bits"] == 8
    ids = [3, 77, 12]
    expected = logits(written.arrays, "llama", ids, FREQS)
    found = np.array(model(mx.array([ids]))[0])
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "m.gguf", kind="Q4_0").path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for n_bytes in (0, 3, 4, 20, 100, 2000, len(whole) // 2, len(whole) - 40):
        cut.write_bytes(whole[:n_bytes])
        with pytest.raises(ConversionError, match="truncated|not a GGUF"):
            convert_gguf(cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BAD_METADATA = [
    ({"llama.block_count": None}, "'llama.block_count' is missing"),
    ({"tokenizer.ggml.tokens": None}, "'tokenizer.ggml.tokens' is missing"),
    ({"tokenizer.ggml.pre": "martian"}, "pre-tokenizer 'martian' is not known"),
    ({"tokenizer.ggml.model": "bert"}, "'bert' vocabulary is not supported"),
    ({"llama.expert_count": 8}, "mixture of experts"),
    ({"llama.rope.dimension_count": 8}, "rope size 8"),
    (
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
        "'longrope' is not supported",
    ),
    ({"llama.block_count": 3}, "missing model.layers.2"),
    ({"llama.feed_forward_length": 128}, "metadata say"),
    ({"llama.block_count": 10**9}, "1,000,000,000 layers, but only"),
    ({"llama.attention.head_count": 0}, "does not describe a model"),
    ({"llama.attention.layer_norm_rms_epsilon": "small"}, "does not describe a model"),
    ({"general.alignment": 0}, "header is damaged"),
    ({"general.alignment": "wide"}, "header is damaged"),
]


@pytest.mark.parametrize(("metadata", "message"), BAD_METADATA)
def test_bad_metadata_are_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    written = write_model(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(ConversionError, match=message):
        convert_gguf(written.path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_headers_that_mean_something_else(tmp_path: Path) -> None:
    """A tensor twice, one of too many dimensions, and rows that are no whole blocks."""

    def refused(message: str, old: bytes, new: bytes) -> None:
        path = write_model(tmp_path / "m.gguf", kind="Q8_0").path
        raw = path.read_bytes()
        assert raw.count(old) == 1 and len(old) == len(new)
        path.write_bytes(raw.replace(old, new))
        with pytest.raises(ConversionError, match=message):
            read_gguf(path)

    refused(
        r"two tensors are called 'blk\.0\.ffn_norm\.weight'",
        b"blk.1.ffn_norm.weight",
        b"blk.0.ffn_norm.weight",
    )
    refused(
        r"damaged .*a tensor is called blk\.1\\nffn_norm",
        b"blk.1.ffn_norm.weight",
        b"blk.1\nffn_norm.weight",
    )
    name, rows = b"blk.1.ffn_up.weight", (96).to_bytes(8, "little")
    two = name + (2).to_bytes(4, "little") + (64).to_bytes(8, "little") + rows
    odd = name + (2).to_bytes(4, "little") + (63).to_bytes(8, "little") + rows
    refused(r"rows of tensor 'blk\.1\.ffn_up\.weight', \[96, 63\], are not a multiple of 32", two, odd)
    refused(
        "a tensor of 5000 dimensions", name + (2).to_bytes(4, "little"), name + (5000).to_bytes(4, "little")
    )


def test_missing_and_unknown_tensors_are_listed(tmp_path: Path) -> None:
    extra = {"blk.0.ssm_in.weight": np.zeros((HIDDEN, HIDDEN), np.float32)}
    written = write_model(tmp_path / "a.gguf", extra=extra)
    with pytest.raises(ConversionError, match=r"blk\.0\.ssm_in\.weight"):
        convert_gguf(written.path, tmp_path / "out")
    written = write_model(tmp_path / "b.gguf", leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(ConversionError, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(written.path, tmp_path / "out")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    finish(writer)
    with pytest.raises(ConversionError, match="architecture 'mamba' is not supported"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_an_existing_folder_stays_unless_forced(tmp_path: Path) -> None:
    written = write_model(tmp_path / "m.gguf")
    out = convert_gguf(written.path, tmp_path / "out")
    (out / "mine.txt").write_text("x")
    with pytest.raises(MTPError, match="exists already"):
        convert_gguf(written.path, out)
    assert (out / "mine.txt").exists()
    convert_gguf(written.path, out, force=True)
    assert not (out / "mine.txt").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("x")
    with pytest.raises(MTPError, match="not a model folder"):
        convert_gguf(written.path, other, force=True)


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_model(tmp_path / "m.gguf")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mtp_mlx.convert.gguf.model._write_json", full)
    with pytest.raises(MTPError, match="the disk is full"):
        convert_gguf(written.path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_folder_that_another_process_wrote_meanwhile_stays(tmp_path: Path) -> None:
    written, out = write_model(tmp_path / "m.gguf"), tmp_path / "out"

    def other(stage: str) -> None:
        if stage == "writing":
            out.mkdir()
            (out / "config.json").write_text("theirs")

    with pytest.raises(MTPError, match="exists already"):
        convert_gguf(written.path, out, progress=other)
    assert [p.name for p in out.iterdir()] == ["config.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]
