"""Proves that whole checkpoints of every family become mlx-lm folders, heads beside them, and nothing is lost."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mtp_mlx.convert.whole import DEFAULT, WholeSettings, report_lines
from mtp_mlx.errors import MTPError
from tests.convert.checkpoints import bf16, write_safetensors, write_shards
from tests.convert.conversions import whole_model
from tests.convert.heads.head_checkpoints import numbers
from tests.convert.read.torch_files import write_torch
from tests.convert.whole_checkpoints import WHOLE, Whole, config_of, whole, with_tokenizer


def parameters(folder: Path) -> dict[str, mx.array]:
    """What mlx-lm loads from a folder."""
    model, _ = load_model(folder)
    return dict(tree_flatten(model.parameters()))


def assert_holds(folder: Path, made: Whole) -> None:
    """The folder's trunk and heads are the tensors that `made` was written from, bit for bit."""
    loaded = parameters(folder)
    assert loaded.keys() == made.trunk.keys()
    for key, value in made.trunk.items():
        np.testing.assert_array_equal(np.array(loaded[key].astype(mx.float32)), value, err_msg=key)
    heads: Any = mx.load(str(folder / "mtp" / "mtp.safetensors"))
    assert heads.keys() == made.made.canonical.keys()
    for key, value in made.made.canonical.items():
        np.testing.assert_array_equal(np.array(heads[key].astype(mx.float32)), value, err_msg=key)


@pytest.mark.parametrize("name", WHOLE)
def test_every_family(tmp_path: Path, name: str) -> None:
    """mlx-lm's sanitize drops, keeps or chokes on heads; here the trunk is whole and the heads lie beside it."""
    made = whole(name)
    result = whole_model(made.write(tmp_path / "model"), tmp_path / "out")
    assert_holds(tmp_path / "out", made)
    assert result.left_out == ([] if "ernie" not in name else result.left_out)
    assert result.heads is not None and result.heads.count == len(
        {k.split(".")[1] for k in made.made.canonical}
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


# --- other containers ---------------------------------------------------------------------------------------


def torch_folder(folder: Path, made: Whole, file: str = "pytorch_model.bin", prefix: str = "") -> Path:
    """`made` as a PyTorch file."""
    made.write(folder)
    (folder / "model.safetensors").unlink()
    stored = OrderedDict((prefix + name, value) for name, value in made.made.stored.items())
    content: Any = (
        {"state_dict": stored, "hyper_parameters": {"lr": 0.1}} if file.endswith(".ckpt") else stored
    )
    write_torch(folder / file, content)
    return folder


@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("pytorch_model.bin", ""),
        ("model.pt", ""),
        ("model.pth", "module."),
        ("last.ckpt", "model."),
        ("x.ckpt", ""),
    ],
)
def test_pytorch_files(tmp_path: Path, file: str, prefix: str) -> None:
    made = whole("mimo-7b")
    source = torch_folder(tmp_path / "model", made, file, prefix)
    whole_model(source, tmp_path / "out")
    assert_holds(tmp_path / "out", made)
    whole_model(source / file, tmp_path / "of one file")
    assert_holds(tmp_path / "of one file", made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "of one file", "out"]


def test_shards_whatever_they_are_called(tmp_path: Path) -> None:
    """mlx-lm reads every model*.safetensors and no other; here the index counts."""
    made = whole("deepseek-v3")
    source = made.write(tmp_path / "model")
    (source / "model.safetensors").unlink()
    names = sorted(made.made.stored)
    stored = made.made.stored
    write_shards(source, {"a.safetensors": {n: stored[n] for n in names[::2]},
                          "model-2.safetensors": {n: stored[n] for n in names[1::2]}})  # fmt: skip
    write_safetensors(source / "model-old.safetensors", {"model.norm.weight": numbers("old", (48,))})
    whole_model(source, tmp_path / "out")
    assert_holds(tmp_path / "out", made)


def test_fp8_with_block_scales(tmp_path: Path) -> None:
    """One weight of the trunk and one of the head are 1.5 x 0.25 in blocks of 128."""
    made = whole("llama with own heads")
    source = made.write(tmp_path / "model", quantization_config={"quant_method": "fp8"})
    stored, dtypes = dict(made.made.stored), {}
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"):
        shape = stored[name].shape
        stored[name], dtypes[name] = np.full(shape, 0x3C, np.uint8), "F8_E4M3"  # 1.5
        stored[name + "_scale_inv"] = np.full((1, 1), 0.25, np.float32)
    write_safetensors(source / "model.safetensors", stored, dtypes)
    made.trunk["model.layers.1.mlp.up_proj.weight"] = np.full((56, 48), 0.375, np.float32)
    made.made.canonical["heads.0.block.mlp.up_proj.weight"] = np.full((56, 48), 0.375, np.float32)
    whole_model(source, tmp_path / "out")
    assert_holds(tmp_path / "out", made)
    assert "quantization_config" not in config_of(tmp_path / "out")


def test_metas_own_names(tmp_path: Path) -> None:
    """consolidated.pth with params.json: q and k rows lie in pairs there, in halves here."""
    stored: dict[str, np.ndarray] = {}
    shapes = {"attention.wq": (32, 32), "attention.wk": (32, 32), "attention.wv": (32, 32), "attention.wo": (32, 32),
              "feed_forward.w1": (88, 32), "feed_forward.w2": (32, 88), "feed_forward.w3": (88, 32),
              "attention_norm": (32,), "ffn_norm": (32,)}  # fmt: skip
    for layer in ("layers.0", "layers.1", "layers.2", "extra_heads.0", "extra_heads.1", "extra_heads.2"):
        stored |= {f"{layer}.{name}.weight": numbers(layer + name, shape) for name, shape in shapes.items()}
    outside = {"tok_embeddings.weight": (40, 32), "norm.weight": (32,), "output.weight": (40, 32)}
    stored |= {name: numbers(name, shape) for name, shape in outside.items()} | {
        "rope.freqs": numbers("f", (4,))
    }
    source = with_tokenizer(tmp_path / "model")
    params = {"dim": 32, "n_layers": 6, "n_heads": 4, "multiple_of": 8, "norm_eps": 1e-5, "vocab_size": -1,
              "n_future_tokens": 4}  # fmt: skip
    (source / "params.json").write_text(json.dumps(params))
    write_torch(source / "consolidated.pth", stored)
    result = whole_model(source, tmp_path / "out")
    assert result.heads is not None and result.heads.count == 3
    loaded = parameters(tmp_path / "out")
    assert len(loaded) == 3 * 9 + 3 and config_of(tmp_path / "out")["vocab_size"] == 40
    np.testing.assert_array_equal(np.array(loaded["model.norm.weight"]), stored["norm.weight"])
    np.testing.assert_array_equal(
        np.array(loaded["model.layers.2.mlp.down_proj.weight"]), stored["layers.2.feed_forward.w2.weight"]
    )
    query = stored["layers.1.attention.wq.weight"].reshape(4, 8, 32)
    halves = np.concatenate([query[:, ::2], query[:, 1::2]], axis=1).reshape(32, 32)
    np.testing.assert_array_equal(np.array(loaded["model.layers.1.self_attn.q_proj.weight"]), halves)


# --- types and quantising -----------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, "float16"])
def test_types(tmp_path: Path, asked: str | None) -> None:
    """Without `dtype` the configuration's type, as mlx_lm.convert has it; heads keep theirs unless asked."""
    made = whole("llama with own heads", torch_dtype="bfloat16")
    whole_model(made.write(tmp_path / "model"), tmp_path / "out", WholeSettings(dtype=asked))
    loaded = parameters(tmp_path / "out")
    heads: Any = mx.load(str(tmp_path / "out" / "mtp" / "mtp.safetensors"))
    wanted = mx.float16 if asked else mx.bfloat16
    assert {value.dtype for value in loaded.values()} == {wanted}
    assert {value.dtype for value in heads.values()} == {mx.float16 if asked else mx.float32}
    assert config_of(tmp_path / "out")["torch_dtype"] == (asked or "bfloat16")
    assert_holds(tmp_path / "out", made)  # multiples of 1/64 below 1 are exact in both


def test_a_quantised_trunk_with_heads_as_they_were(tmp_path: Path) -> None:
    made = whole("llama with own heads", hidden_size=48)
    source = made.write(tmp_path / "model")
    dtypes = {name: "BF16" for name in made.made.stored}
    write_safetensors(source / "model.safetensors", {n: bf16(v) for n, v in made.made.stored.items()}, dtypes)
    whole_model(source, tmp_path / "out", WholeSettings(quantize=4, group_size=32))
    loaded = parameters(tmp_path / "out")
    # Of this model's widths only that of attention's output is a multiple of 32: the rest stays as it is.
    scales = [name for name in loaded if name.endswith(".scales")]
    assert scales == [f"model.layers.{i}.self_attn.o_proj.scales" for i in range(4)]
    weight = made.trunk["model.layers.0.self_attn.o_proj.weight"]
    packed, scale, bias = mx.quantize(mx.array(weight).astype(mx.bfloat16), 32, 4)
    assert mx.array_equal(loaded["model.layers.0.self_attn.o_proj.weight"], packed)
    assert mx.array_equal(loaded["model.layers.0.self_attn.o_proj.scales"], scale)
    heads: Any = mx.load(str(tmp_path / "out" / "mtp" / "mtp.safetensors"))
    assert {value.dtype for value in heads.values()} == {mx.bfloat16}
    with pytest.raises(MTPError, match="quantised already; leave `quantize` out"):
        whole_model(tmp_path / "out", tmp_path / "twice", WholeSettings(quantize=8))


def test_a_converted_folder_takes_its_heads_along(tmp_path: Path) -> None:
    made = whole("mimo-7b")
    whole_model(made.write(tmp_path / "model"), tmp_path / "out")
    whole_model(tmp_path / "out", tmp_path / "again", WholeSettings(dtype="bfloat16"))
    assert_holds(tmp_path / "again", made)


# --- what is lost, and what does not fit --------------------------------------------------------------------


def test_what_mlx_lm_leaves_out_is_told(tmp_path: Path) -> None:
    made = whole("mimo-7b", tie_word_embeddings=True)
    made.made.stored["lm_head.weight"] = made.made.stored["model.embed_tokens.weight"]
    made.made.stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = numbers("inv", (6,))
    result = whole_model(made.write(tmp_path / "model"), tmp_path / "out")
    assert result.left_out == ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "does not use 2 tensor(s), left out: lm_head.weight, model.layers.0" in "\n".join(
        report_lines(result)
    )


def refused(source: Path, out: Path, settings: WholeSettings = DEFAULT) -> str:
    """The message of a conversion that leaves nothing behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(MTPError) as caught:
        whole_model(source, out, settings)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def test_every_misfit_is_in_one_message(tmp_path: Path) -> None:
    made = whole("mimo-7b")
    stored = made.made.stored
    del stored["model.layers.0.mlp.up_proj.weight"]
    stored["model.layers.1.mlp.up_proj.weight"] = numbers("x", (3, 48))
    stored["model.layers.2.mlp.up_proj.weight"] = np.ones((56, 48), np.int32)
    stored["model.layers.0.mlp.side_proj.weight"] = numbers("y", (2, 2))
    stored["model.mtp_layers.0.input_proj.weight"] = numbers("z", (48, 95))
    message = refused(made.write(tmp_path / "model"), tmp_path / "out")
    assert "\n" not in message
    for part in (
        "missing model.layers.0.mlp.up_proj.weight [56, 48]",
        "model.layers.1.mlp.up_proj.weight is [3, 48], [56, 48] expected",
        "model.layers.2.mlp.up_proj.weight is of type int32, a float type expected",
        "unexpected model.layers.0.mlp.side_proj.weight [2, 2], neither the trunk's nor a head's",
        "model.mtp_layers.0.input_proj.weight is [48, 95], [48, 96] expected",
    ):
        assert part in message, message


def test_heads_of_no_known_kind_are_not_dropped_in_silence(tmp_path: Path) -> None:
    """mlx-lm's exaone_moe drops whatever begins with mtp."""
    made = whole("exaone-moe", num_nextn_predict_layers=0)
    stored = {name: value for name, value in made.made.stored.items() if not name.startswith("mtp.")}
    made.made.stored = stored | {"mtp.gadget.weight": numbers("g", (48, 48))}
    assert "mtp.gadget.weight looks like an MTP head's" in refused(
        made.write(tmp_path / "m"), tmp_path / "out"
    )


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    """mlx-lm's qwen3_5 would keep whichever comes last."""
    made = whole("qwen3.5 dense")
    made.made.stored["model.embed_tokens.weight"] = numbers("other", (40, 48))
    message = refused(made.write(tmp_path / "model"), tmp_path / "out")
    assert (
        "model.language_model.embed_tokens.weight and model.embed_tokens.weight are the same tensor"
        in message
    )


def test_heads_that_are_announced_but_not_there(tmp_path: Path) -> None:
    made = whole("mimo-7b")
    made.made.stored = {name: value for name, value in made.made.stored.items() if "mtp_layers" not in name}
    source = made.write(tmp_path / "model")
    assert "announces 1 MTP head(s)" in refused(source, tmp_path / "out")
    whole_model(source, tmp_path / "out", WholeSettings(heads=False))
    assert parameters(tmp_path / "out").keys() == made.trunk.keys()


def test_what_else_is_refused(tmp_path: Path) -> None:
    made = whole("mimo-7b")
    source = made.write(tmp_path / "model")
    (source / "tokenizer.json").unlink()
    assert "the tokenizer cannot be loaded" in refused(source, tmp_path / "out")
    with_tokenizer(source)
    (source / "config.json").unlink()
    assert "there is no config.json" in refused(source, tmp_path / "out", WholeSettings(heads=False))
    made.write(source, model_type="nonesuch")
    assert "model_type in config.json is 'nonesuch'" in refused(source, tmp_path / "out")
    made.write(source, model_type=None)
    assert "mlx-lm cannot load the trunk" in refused(source, tmp_path / "out", WholeSettings(heads=False))
    made.write(source, model_file="run.py")
    (source / "run.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "requires importing and running a custom module" in refused(source, tmp_path / "out")
    shapes = {"0.0.linear.weight": (8, 8), "0.0.linear.bias": (8,), "0.1.weight": (9, 8)}
    medusa = {name: numbers(name, shape) for name, shape in shapes.items()}
    (tmp_path / "medusa").mkdir()
    write_torch(tmp_path / "medusa" / "medusa_lm_head.pt", medusa)
    assert "contains MTP heads but no trunk; convert it with `heads_only`" in refused(
        tmp_path / "medusa", tmp_path / "out"
    )


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    source = whole("mimo-7b").write(tmp_path / "model")
    monkeypatch.setattr("mtp_mlx.convert.whole.fill_folder", full)
    assert "disk is full" in refused(source, tmp_path / "out")
    torch = torch_folder(tmp_path / "torch", whole("mimo-7b"))
    monkeypatch.setattr("mtp_mlx.convert.trunk.save_targets", full)
    with pytest.raises((MTPError, OSError), match="full|No space"):
        whole_model(torch, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "torch"]
