"""Proves that safetensors are read exactly, whole or in shards, and each kind of damage is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.convert.read.lazy_tensor import LazyTensor, from_float32, to_float32
from mtp_mlx.convert.read.safetensors import dequantised, read_safetensors
from mtp_mlx.errors import ConversionError
from tests.convert.checkpoints import bf16, write_safetensors, write_shards

RANDOM = np.random.default_rng(1)


def test_what_mlx_writes_is_read_exactly(tmp_path: Path) -> None:
    """The writer is mlx's, so that reader and test share no mistake."""
    values = mx.random.normal((3, 5), key=mx.random.key(0))
    kinds = {"f": mx.float32, "h": mx.float16, "b": mx.bfloat16, "i": mx.int32, "u": mx.uint8}
    arrays = {name: (values * 9 + 100).astype(kind) for name, kind in kinds.items()}
    arrays |= {"scalar": mx.array(2.5), "empty": mx.zeros((0, 3))}
    mx.save_safetensors(str(tmp_path / "m.safetensors"), arrays, metadata={"format": "mlx"})
    found = read_safetensors(tmp_path / "m.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name].float32(), np.array(array.astype(mx.float32)), err_msg=name)


def test_bfloat16_is_rounded_as_mlx_rounds() -> None:
    values = np.concatenate([RANDOM.normal(size=999) * 10.0 ** RANDOM.integers(-30, 30, 999), [0.0, -0.0]])
    values = np.append(values.astype(np.float32), [np.inf, -np.inf, 1.00390625, 1.01171875])  # two ties
    with np.errstate(over="ignore"):
        expected = mx.array(values).astype(mx.bfloat16).view(mx.uint16)
    np.testing.assert_array_equal(from_float32(values, "BF16"), np.array(expected))
    assert np.isnan(to_float32(from_float32(np.array([np.nan], np.float32), "BF16"), "BF16")).all()


def test_every_fp8_code_is_mlxs() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = np.array(mx.from_fp8(mx.array(codes), dtype=mx.float32))
    found = to_float32(codes, "F8_E4M3")
    usable = codes & 127 != 127  # 0x7F and 0xFF are NaN
    np.testing.assert_array_equal(found[usable], expected[usable])
    assert np.isnan(found[~usable]).all()


@pytest.mark.parametrize("shape", [(128, 256), (130, 300), (5, 7), (2, 130, 129)])
def test_fp8_blocks_are_dequantised(shape: tuple[int, ...]) -> None:
    codes = RANDOM.integers(0, 127, shape).astype(np.uint8)
    *lead, m, n = shape
    scales = RANDOM.uniform(0.5, 2, (*lead, -(-m // 128), -(-n // 128))).astype(np.float32)
    expected = np.array(mx.from_fp8(mx.array(codes), dtype=mx.float32))
    for index in np.ndindex(*shape):
        expected[index] *= scales[(*index[:-2], index[-2] // 128, index[-1] // 128)]
    tensors = {
        "x.weight": LazyTensor("F8_E4M3", shape, lambda: codes),
        "x.weight_scale_inv": LazyTensor("F32", scales.shape, lambda: scales),
        "y.weight": LazyTensor("F32", scales.shape, lambda: scales),
    }
    found = dequantised(tensors, Path("here"))
    assert found.keys() == {"x.weight", "y.weight"} and found["x.weight"].dtype == "BF16"
    np.testing.assert_array_equal(
        found["x.weight"].load(), np.array(mx.array(expected).astype(mx.bfloat16).view(mx.uint16))
    )


def test_fp8_without_fitting_scales_is_refused(tmp_path: Path) -> None:
    codes = np.zeros((130, 8), np.uint8)
    tensors = {"a.weight": codes, "b.weight": codes, "b.weight_scale_inv": np.ones((1, 1), np.float32)}
    tensors |= {"c.weight": codes[0], "c.weight_scale_inv": np.ones((), np.float32)}
    types = {name: "F8_E4M3" for name, value in tensors.items() if value.dtype == np.uint8}
    write_safetensors(tmp_path / "m.safetensors", tensors, types)
    with pytest.raises(ConversionError) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert "'a.weight' has no scales 'a.weight_scale_inv'" in message
    assert "'b.weight_scale_inv' is [1, 1], [2, 1] expected" in message and "128 x 128" in message
    assert "'c.weight' is [8], not a matrix" in message


def test_shards_and_their_index(tmp_path: Path) -> None:
    a, b = RANDOM.normal(size=(2, 3, 4)).astype(np.float32)
    write_shards(tmp_path, {"model-1.safetensors": {"a": a}, "model-2.safetensors": {"b": b}})
    write_safetensors(tmp_path / "other.safetensors", {"c": a})  # not in the index: not part of the model
    found = open_checkpoint(tmp_path)
    assert (found.container, found.files) == ("safetensors", ["model-1.safetensors", "model-2.safetensors"])
    np.testing.assert_array_equal(found.tensors["a"].float32(), a)
    np.testing.assert_array_equal(found.tensors["b"].float32(), b)
    assert found.tensors.keys() == {"a", "b"}


def edited(path: Path, edit: Any) -> None:
    """Rewrite a safetensors file with its header changed by `edit`."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


HEADERS = [
    (lambda h: h["w"].update(dtype="F4"), "tensor 'w' has the type F4, which is not supported"),
    (lambda h: h["w"].update(dtype="F64"), "needs 192 bytes but has 96 in the header"),
    (lambda h: h["w"].update(shape=[4, 7]), r"F32 \[4, 7\], needs 112 bytes but has 96 in the header"),
    (lambda h: h["w"].update(shape=[-4, -6]), "header is damaged"),
    (lambda h: h["w"].update(data_offsets=[96, 192]), "tensor 'w' ends at byte .* but the file has"),
    (lambda h: h["w"].pop("dtype"), "header is damaged"),
    (lambda h: h.update(w=[]), "header is damaged"),
    (lambda h: h.update({"\x1b[2J": h.pop("w")}), r"header is damaged \(a tensor is called '\\x1b\[2J'\)"),
    (lambda h: h["w"].update(dtype=["F32"]), r"header is damaged \(a type or a shape is not as the format"),
    (lambda h: h["w"].update(shape="46"), r"header is damaged \(a type or a shape is not as the format"),
    (
        lambda h: h["w"].update(shape=[True, 24]),
        r"header is damaged \(a shape or an offset is not a whole number",
    ),
    (
        lambda h: h["w"].update(shape=[1] * 63 + [4, 6]),
        r"header is damaged \(a type or a shape is not as the format",
    ),
    (
        lambda h: h["w"].update(shape=[10**4000] * 2),
        r"header is damaged \(a shape or an offset is impossible",
    ),
    (lambda h: h["w"].update(shape=[0, 10**30], data_offsets=[0, 0]), "header is damaged"),
    (
        lambda h: h.update(v={"dtype": "F32", "shape": [2], "data_offsets": [88, 96]}),
        r"header is damaged \('w' and 'v' share bytes",
    ),
]


@pytest.mark.parametrize(("edit", "message"), HEADERS)
def test_a_header_that_does_not_fit_its_data_is_refused(tmp_path: Path, edit: Any, message: str) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"w": np.ones((4, 6), np.float32)})
    edited(path, edit)
    with pytest.raises(ConversionError, match=message):
        read_safetensors(path)


def test_a_truncated_shard_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    arrays = {"a": np.ones((8, 8), np.float32), "b": np.ones((8, 8), np.float32)}
    write_shards(tmp_path, {"s1.safetensors": {"a": arrays["a"]}, "s2.safetensors": {"b": arrays["b"]}})
    whole = (tmp_path / "s2.safetensors").read_bytes()
    for n_bytes in (0, 7, 8, 40, len(whole) - 200, len(whole) - 1):
        (tmp_path / "s2.safetensors").write_bytes(whole[:n_bytes])
        with pytest.raises(ConversionError, match=r"s2\.safetensors: .*truncated") as caught:
            open_checkpoint(tmp_path)
        assert len(str(caught.value).splitlines()) == 1


def test_a_header_of_nonsense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for text in (b"{", b"[]", b"\xff\xfe", b"[" * 5000, b'{"w": 3}'):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ConversionError, match="damaged"):
            read_safetensors(path)
    text = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "w": {}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ConversionError, match="'w' is in it twice"):
        read_safetensors(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ConversionError, match="truncated, or not a safetensors"):
        read_safetensors(path)


def test_indexes_that_do_not_fit_their_files(tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    index = write_shards(tmp_path, {"s1.safetensors": {"a": one}, "s2.safetensors": {"b": one}})

    def refused(weight_map: Any, message: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConversionError, match=message):
            open_checkpoint(tmp_path)

    refused({"a": "s1.safetensors", "x": "s2.safetensors"}, "names 1 tensors that its files do not hold: x")
    refused(
        {"a": "s1.safetensors", "b": "s3.safetensors"}, "1 of which are missing: s3.safetensors; download"
    )
    refused({"a": "../s1.safetensors"}, r"outside its own folder \(\.\./s1\.safetensors\)")
    refused([], "index is damaged")
    for text in ("{", "[" * 100_000):
        index.write_text(text)
        with pytest.raises(ConversionError, match="index is damaged"):
            open_checkpoint(tmp_path)
    write_safetensors(tmp_path / "s2.safetensors", {"a": one, "b": one})
    refused({"a": "s1.safetensors", "b": "s2.safetensors"}, r"'a' is in s1\.safetensors too")


def test_bfloat16_helper_is_exact() -> None:
    assert to_float32(bf16(np.array([1.5, -2.0])), "BF16").tolist() == [1.5, -2.0]
