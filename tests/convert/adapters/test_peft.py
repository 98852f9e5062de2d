"""Proves that a PEFT LoRA folder with slot embeddings becomes the adapter it describes; others say what they lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mtp_mlx.convert.adapters.peft import write_peft
from mtp_mlx.convert.adapters.peft_plan import is_peft, plan_lines
from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.block import Block
from tests.convert.checkpoints import write_safetensors
from tests.convert.heads.head_checkpoints import numbers
from tests.tiny import VOCABULARY, tiny_model

PREFIX = "base_model.model."
SIZES = {"q_proj": (48, 64), "v_proj": (48, 32)}  # of tests.tiny: in, out


def factors(rank: int = 4) -> dict[str, np.ndarray]:
    """LoRA factors of q and v in both layers."""
    out = {}
    for layer in range(2):
        for name, (width, height) in SIZES.items():
            stem = f"{PREFIX}model.layers.{layer}.self_attn.{name}.lora_"
            out[f"{stem}A.weight"] = numbers(f"{layer}{name}A", (rank, width))
            out[f"{stem}B.weight"] = numbers(f"{layer}{name}B", (height, rank))
    return out


SLOTS = {f"{PREFIX}slot_embeddings.weight": numbers("slots", (3, 48))}
SAMPLER = {
    f"{PREFIX}sampler.{name}": numbers(name, shape)
    for name, shape in {
        "first.weight": (20, 96),
        "first.bias": (20,),
        "norm.weight": (20,),
        "norm.bias": (20,),
        "second.weight": (48, 20),
    }.items()
}


def folder(path: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """A PEFT folder."""
    path.mkdir()
    write_safetensors(path / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False} | config
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def write(source: Path, out: Path) -> Path:
    """Convert for the tiny llama."""
    return write_peft(open_checkpoint(source), tiny_model("llama", seed=3), "tiny", out)


def slot_logits(model: Any, path: Path) -> np.ndarray:
    """[k, D] states of the slots behind a short text, by the runtime."""
    adapter, _ = load_folder(path, model)
    attached = attach(model, adapter)
    ids = mx.array([[5, 9, 2, *range(VOCABULARY, VOCABULARY + 3)]])
    block = Block(ids, n_real=3, positions=mx.arange(6), visibility=mx.tril(mx.ones((6, 6), dtype=mx.bool_)))
    hidden = attached.forward(block, attached.make_cache())
    attached.detach()
    return np.array(hidden[0, 3:])


def merged(model: Any, scale: float) -> np.ndarray:
    """The same by hand: base states of the text, then slots through weights with the update merged into them."""
    text, slots = mx.array([[5, 9, 2]]), mx.array(SLOTS[f"{PREFIX}slot_embeddings.weight"])[None]
    cache = make_prompt_cache(model)
    model.model(text, cache=cache)
    stored = factors()
    for layer in range(2):
        for name in SIZES:
            stem = f"{PREFIX}model.layers.{layer}.self_attn.{name}.lora_"
            module = getattr(model.model.layers[layer].self_attn, name)
            module.weight = module.weight + scale * mx.array(
                stored[f"{stem}B.weight"] @ stored[f"{stem}A.weight"]
            )
    hidden = model.model(mx.zeros((1, 3), dtype=mx.int32), cache=cache, input_embeddings=slots)
    return np.array(hidden[0])


@pytest.mark.parametrize(("config", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0)])
def test_slot_rows_are_what_peft_would_compute(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    """alpha / r = 8 / 4, rank-stabilised alpha / sqrt(r) = 8 / 2. Numbers are exact in the bfloat16 of the folder."""
    out = write(folder(tmp_path / "lora", factors() | SLOTS | SAMPLER, **config), tmp_path / "out")
    found = slot_logits(tiny_model("llama", seed=3), out)
    expected = merged(tiny_model("llama", seed=3), scale)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_everything_is_taken_over(tmp_path: Path) -> None:
    ids = {f"{PREFIX}draft_ids": np.array([3, 9, 64], np.int64)}
    out = write(folder(tmp_path / "lora", factors() | SLOTS | SAMPLER | ids), tmp_path / "out")
    adapter, info = load_folder(out, tiny_model("llama", seed=3))
    shape = adapter.config
    assert (shape.slots, shape.rank, shape.sampler_width, shape.draft_vocab_size) == (3, 4, 20, 3)
    assert shape.target_modules == ("q_proj", "v_proj") and info.base_name == "tiny"
    tensors = adapter.tensors()
    np.testing.assert_array_equal(np.array(tensors["draft_ids"]), [3, 9, 64])
    for name, value in SAMPLER.items():
        np.testing.assert_array_equal(np.array(tensors[name.removeprefix(PREFIX)]), value, err_msg=name)


def test_slots_as_rows_of_a_larger_embedding(tmp_path: Path) -> None:
    """Mask tokens that were added to the vocabulary; without a sampler head slots keep their own prediction."""
    table = {f"{PREFIX}model.embed_tokens.weight": numbers("table", (VOCABULARY + 2, 48))}
    out = write(folder(tmp_path / "lora", factors() | table), tmp_path / "out")
    adapter, info = load_folder(out, tiny_model("llama", seed=3))
    np.testing.assert_array_equal(
        np.array(adapter.slot_embeddings.weight), list(table.values())[0][VOCABULARY:]
    )
    assert info.training["sampler head"] == "none, untrained"
    z = mx.random.normal((2, 48))
    assert mx.array_equal(adapter.sampler(mx.ones((2, 48)), z), z)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (factors(), {}, "cannot draft without slot embeddings: the file has neither"),
        (
            factors() | SLOTS,
            {"use_dora": True, "bias": "all"},
            "has use_dora True, bias 'all', which gated LoRA",
        ),
        (factors() | SLOTS, {"peft_type": "IA3"}, "has peft_type IA3"),
        (factors() | SLOTS | {"strange.weight": numbers("s", (2,))}, {}, "unexpected strange.weight"),
        (
            {k: v for k, v in factors().items() if "1.self_attn.v_proj" not in k} | SLOTS,
            {},
            "missing low_rank.layers.1",
        ),
        (
            {k: v for k, v in factors().items() if "q_proj.lora_B" not in k} | SLOTS,
            {},
            "missing base_model.model.model",
        ),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], message: str
) -> None:
    source = folder(tmp_path / "lora", tensors, **config)
    assert is_peft(open_checkpoint(source))
    with pytest.raises(MTPError) as caught:
        write(source, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    if "unexpected" not in message and "missing low_rank" not in message:  # which only the base says
        with pytest.raises(MTPError) as planned:
            plan_lines(open_checkpoint(source))
        assert message.split("the file has")[0] in str(planned.value)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_the_plan(tmp_path: Path) -> None:
    plan = "\n".join(plan_lines(open_checkpoint(folder(tmp_path / "lora", factors() | SLOTS | SAMPLER))))
    for part in (
        "layers: 4 of rank 4",
        "slots: 3",
        "sampler head: from the file",
        "becomes a mask-token adapter",
    ):
        assert part in plan
    assert "low_rank.layers.0.self_attn.q_proj.down [48, 4] <- base_model" in plan
    table = {f"{PREFIX}model.embed_tokens.weight": numbers("table", (VOCABULARY + 2, 48))}
    plan = "\n".join(plan_lines(open_checkpoint(folder(tmp_path / "rows", factors() | table))))
    assert "slots: rows of model.embed_tokens.weight beyond" in plan and "an untrained one is written" in plan


def test_two_ranks_are_refused(tmp_path: Path) -> None:
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_"
    other = {f"{name}A.weight": numbers("a", (2, 48)), f"{name}B.weight": numbers("b", (64, 2))}
    with pytest.raises(MTPError, match=r"the ranks \[2, 4\]"):
        write(folder(tmp_path / "lora", factors() | other | SLOTS), tmp_path / "out")


def test_the_scale_is_the_adapters_own(tmp_path: Path) -> None:
    """config.json beside an adapter is its base's; without the adapter's own file the scale is not guessed."""
    source = folder(tmp_path / "lora", factors() | SLOTS)
    (source / "config.json").write_text('{"model_type": "llama"}')
    adapter, _ = load_folder(write(source, tmp_path / "out"), tiny_model("llama", seed=3))
    assert adapter.config.alpha == 8
    (source / "adapter_config.json").unlink()
    for beside in (True, False):
        assert (source / "config.json").is_file() == beside
        with pytest.raises(MTPError, match="no adapter_config.json beside the factors"):
            write(source, tmp_path / "other")
        with pytest.raises(MTPError, match="no adapter_config.json beside the factors"):
            plan_lines(open_checkpoint(source))
        (source / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": "8"}, "lora_alpha in adapter_config.json is '8', a number expected"),
        ({"lora_alpha": None}, "lora_alpha in adapter_config.json is None, a number expected"),
        ({"lora_alpha": float("inf")}, "lora_alpha in adapter_config.json is inf, a number expected"),
        ({"r": 8}, "r in adapter_config.json is 8, but the factors have rank 4"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"use_qalora": True}, "use_qalora True"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    source = folder(tmp_path / "lora", factors() | SLOTS, **config)
    with pytest.raises(MTPError, match=message):
        write(source, tmp_path / "out")
    with pytest.raises(MTPError, match=message):
        plan_lines(open_checkpoint(source))


STEM = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_"
ODD: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "a convolution's factor": ({f"{STEM}A.weight": numbers("A", (4, 48, 1, 1))}, "are matrices"),
    "a vector": ({f"{STEM}A.weight": numbers("A", (4,))}, "are matrices"),
    "another adapter's name": ({f"{STEM}A.mtp.weight": numbers("A", (4, 48))}, "is not a known factor"),
    "a bias": ({f"{STEM}B.bias": numbers("A", (64,))}, "is not a known factor"),
    "one factor twice": ({f"{STEM}A.default.weight": numbers("A", (4, 48))}, "are the same factor"),
    "one layer twice": (
        {f"{STEM}{part}.weight".replace("model.layers", "layers"): numbers(part, (4, 48)) for part in "AB"},
        "is there twice",
    ),
    "an id twice": ({"draft_ids": np.array([3, 3], np.int64)}, "must be distinct whole numbers"),
    "an id of no token": ({"draft_ids": np.array([3, 10**6], np.int64)}, "must be distinct whole numbers"),
    "half an id": ({"draft_ids": np.array([3.5], np.float32)}, "must be distinct whole numbers"),
    "a single id": ({"draft_ids": np.array(3, np.int64)}, "must be distinct whole numbers"),
    "a sampler of one number": ({"sampler.first.weight": np.array(3, np.float32)}, r"is F32 \[\]"),
    "slots of whole numbers": ({"slot_embeddings.weight": np.ones((3, 48), np.int64)}, r"is I64 \[3, 48\]"),
}


@pytest.mark.parametrize("what", list(ODD))
def test_tensors_that_mean_something_else(tmp_path: Path, what: str) -> None:
    """None of them is left out or taken for something in silence, and none ends in a traceback."""
    tensors, message = ODD[what]
    prefixed = {n if n.startswith(PREFIX) else PREFIX + n: value for n, value in tensors.items()}
    source = folder(tmp_path / "lora", factors() | SLOTS | prefixed)
    with pytest.raises(MTPError, match=message):
        write(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
