"""Proves that every quantisation is read as llama.cpp lays it out, and that types which cannot be read are named.

Two oracles: the package `gguf`, for the types that are dequantised here; for those that `gguf` dequantises,
arithmetic by element, from ggml's description of the blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.convert.gguf.blocks import BY_LIBRARY, DEQUANTISERS, dequantiser
from mtp_mlx.convert.gguf.file import TENSOR_TYPES
from mtp_mlx.convert.gguf.model import convert_gguf
from mtp_mlx.convert.gguf.names import SUPPORTED_TYPES, check_tensors
from mtp_mlx.convert.gguf.parts import read_gguf
from mtp_mlx.convert.gguf.weights import dequantise
from mtp_mlx.errors import ConversionError
from tests.convert.gguf.gguf_files import READ_ONLY, finish, random_blocks, write_model


@pytest.mark.parametrize("kind", sorted(DEQUANTISERS))
def test_each_block_type_equals_gguf_on_random_bytes(kind: str) -> None:
    block_bytes = next(n for name, _, n in TENSOR_TYPES.values() if name == kind)
    raw = np.random.default_rng(3).integers(0, 256, (7, block_bytes * 64), dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):  # random scales may be inf or nan
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).ravel()
        found = DEQUANTISERS[kind](raw.reshape(-1, block_bytes)).ravel()
    finite = np.isfinite(expected)
    assert finite.mean() > 0.5
    np.testing.assert_array_equal(found[finite], expected[finite])


@pytest.mark.parametrize("kind", sorted(SUPPORTED_TYPES))
def test_block_sizes_are_those_of_gguf(kind: str) -> None:
    number, sizes = next((i, sizes) for i, (name, *sizes) in TENSOR_TYPES.items() if name == kind)
    assert gguf.GGMLQuantizationType[kind] == number
    assert tuple(sizes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


IQ4_VALUES = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def half(block: list[int], at: int) -> float:
    """The float16 at a byte of a block."""
    return float(np.array(block[at : at + 2], np.uint8).view("<f2")[0])


def crumb(quants: list[int], e: int) -> int:
    """Two bits of element `e` of 256: every 32 bytes hold 128 elements, 32 in each pair of bits."""
    return quants[e // 128 * 32 + e % 32] >> e % 128 // 32 * 2 & 3


def nibble(quants: list[int], e: int) -> int:
    """Four bits of element `e` of 32: low halves first."""
    return quants[e] & 15 if e < 16 else quants[e - 16] >> 4


def q2_k(b: list[int]) -> list[float]:
    """16 bytes of scales and minima, 64 of quants, two halves."""
    scale, least = half(b, 80), half(b, 82)
    return [scale * (b[e // 16] & 15) * crumb(b[16:80], e) - least * (b[e // 16] >> 4) for e in range(256)]


def q3_k(b: list[int]) -> list[float]:
    """32 bytes of high bits (a zero subtracts 4), 64 of low ones, 12 of scales in 6 bits, one half."""
    out = []
    for e in range(256):
        group = e // 16
        low = b[96 + group % 8] >> (group // 8 * 4) & 15
        scale = (low | (b[104 + group % 4] >> group // 4 * 2 & 3) << 4) - 32
        high = b[e % 32] >> e // 32 & 1
        out.append(half(b, 108) * scale * (crumb(b[32:96], e) - 4 * (1 - high)))
    return out


def iq4_nl(b: list[int]) -> list[float]:
    """One half and 16 bytes of places in a table."""
    return [half(b, 0) * IQ4_VALUES[nibble(b[2:], e)] for e in range(32)]


def iq4_xs(b: list[int]) -> list[float]:
    """One half, 8 scales in 6 bits (2 bytes of high bits, 4 of low ones), 128 bytes of places in the table."""
    out = []
    for group in range(8):
        low, high = b[4 + group // 2] >> group % 2 * 4 & 15, (b[2] | b[3] << 8) >> 2 * group & 3
        quants = b[8 + 16 * group :][:16]
        out += [half(b, 0) * ((low | high << 4) - 32) * IQ4_VALUES[nibble(quants, e)] for e in range(32)]
    return out


NAIVE: dict[str, Callable[[list[int]], list[float]]] = {
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
}


@pytest.mark.parametrize("kind", sorted(NAIVE))
def test_types_of_the_library_are_read_element_by_element(tmp_path: Path, kind: str) -> None:
    raw = random_blocks(np.random.default_rng(4), (3, 1024), kind)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    finish(writer)
    info = read_gguf(tmp_path / "m.gguf").tensors["blk.0.ffn_up.weight"]
    blocks = raw.reshape(-1, READ_ONLY[kind][0]).tolist()
    expected = np.array([NAIVE[kind](block) for block in blocks]).reshape(3, 1024)
    np.testing.assert_allclose(np.array(dequantise(info)), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", BY_LIBRARY)
def test_the_library_has_every_type_that_is_left_to_it(kind: str) -> None:
    elements, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    found = dequantiser(kind)(np.zeros((5, n_bytes), np.uint8))
    assert found.size == 5 * elements and found.dtype == np.float32 and not found.any()


@pytest.mark.parametrize("kind", sorted(NAIVE))
def test_models_of_types_of_the_library_are_converted(tmp_path: Path, kind: str) -> None:
    written = write_model(tmp_path / "m.gguf", "qwen3", kind, hidden=256, metadata=WIDE)
    weights = mx.load(
        str(convert_gguf(written.path, tmp_path / "out", dtype="float32") / "model.safetensors")
    )
    for theirs, ours in (("ffn_up", "mlp.up_proj"), ("attn_k", "self_attn.k_proj")):
        found = np.array(weights[f"model.layers.1.{ours}.weight"])
        np.testing.assert_array_equal(found, written.arrays[f"blk.1.{theirs}.weight"])


WIDE = {f"qwen3.{key}": value for key, value in {"embedding_length": 256, "attention.key_length": 16}.items()}
WIDE["qwen3.attention.value_length"] = 16


def test_without_the_library_its_types_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write_model(tmp_path / "plain.gguf", kind="Q8_0").path
    written = write_model(tmp_path / "m.gguf", kind="IQ4_NL").path
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = r"type IQ4_NL \(token_embd\.weight and 14 more\) are read through .* pip install '\.\[gguf\]'"
    with pytest.raises(ConversionError, match=message):
        convert_gguf(written, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "plain.gguf"]
    convert_gguf(plain, tmp_path / "out")  # which needs no library


def test_no_type_is_listed_twice() -> None:
    assert not DEQUANTISERS.keys() & set(BY_LIBRARY)


def test_an_unsupported_type_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    raw = np.zeros((4, 54), dtype=np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=gguf.GGMLQuantizationType.TQ1_0)
    finish(writer)
    with pytest.raises(ConversionError, match=r"TQ1_0 \(blk\.0\.attn_q\.weight.*Supported are .*Q8_0"):
        check_tensors(read_gguf(tmp_path / "m.gguf"))
