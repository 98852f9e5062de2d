"""Proves that heads of any shape train, are stored and decode the same text: several layers, lower layers' states,
one head for all drafts; and that shapes that do not fit are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.adapter_folder import read_header
from mtp_mlx.api import load, stream_generate
from mtp_mlx.convert.heads.speculators import export_speculators
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import ChainPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.heads import agreement
from mtp_mlx.drafters.heads.cascade import new_heads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.folder import config_of
from mtp_mlx.drafters.heads.mtp_head import last_layers
from mtp_mlx.drafters.heads.start import start_like_trunk
from mtp_mlx.drafters.heads.taps import TapFusion, layer_numbers
from mtp_mlx.drafters.heads.trunk_states import ComputedStates
from mtp_mlx.drafters.registry import folder_facts, load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.planning.calibrate import measure
from mtp_mlx.train.data import Example
from mtp_mlx.train.trainer import Trainer
from tests.tiny import save_tiny, tiny_config, tiny_model
from tests.train.training import Remembering, make_trainer, settings_for, trainer_for

SHAPES: dict[str, dict[str, Any]] = {
    "shared": {"shared": True},
    "two layers": {"layers": 2},
    "taps": {"taps": "1,last"},
    "all": {"shared": True, "layers": 2, "taps": "low,middle,last"},
}


def shaped(out: Path, listener: Any = None, model: Any = None, **changes: Any) -> Trainer:
    return trainer_for(out, listener, model, method="mtp-heads", **changes)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def taken(run: Trainer) -> np.ndarray:
    """What the first head takes of fixed random states, normalised."""
    heads = run.method.module
    states = [mx.random.normal((1, 4, 48), key=mx.random.key(layer)) for layer in (*heads.tapped_layers, 99)]
    return np.array(heads.heads[0].norm_hidden(heads.first_state(mx.concatenate(states, axis=-1))))


def load_tensors(folder: Path) -> dict[str, mx.array]:
    return cast("dict[str, mx.array]", mx.load(str(folder / "mtp.safetensors")))


def check_drafts(folder: Path, build: Callable[[], Any], **changes: Any) -> None:
    """On the base's own text, learnt by heart, each step accepts as many drafts as teacher forcing finds right."""
    prompt = [5, 9, 2]
    plain = [item.token for item in mtp_generate_step(prompt, attach(build()), max_tokens=44)]
    row = Example(prompt + plain, len(prompt))
    changes = {"steps": 25, "learning_rate": 5e-3, "draft_vocab": 0, "measure_every": 0, **changes}
    settings = settings_for(folder, "mtp-heads", batch_size=1, micro_batches=1, **changes)
    assert make_trainer(build(), [row], [row], settings, Remembering()).run()
    model, stats = build(), DecodeStats()
    attached = attach(model, load_folder(folder, model)[0])
    right = agreement._right(attached, [row], 3, ComputedStates(attached))
    steps = mtp_generate_step(prompt, attached, max_tokens=30, policy=ChainPolicy(3), stats=stats)
    assert [item.token for item in steps] == plain[:30]
    left, expected = 29, []  # tokens behind the first, which comes without drafts
    while left > 0:
        expected.append(min(int(np.cumprod(right[29 - left]).sum()), left - 1))
        left -= expected[-1] + 1
    assert sum(stats.accepted) == sum(expected) > 12, (stats, expected)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one head with everything."""
    folder = tmp_path_factory.mktemp("every") / "heads"
    assert shaped(folder, steps=5, **SHAPES["all"]).run()
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_trained_heads_draft_and_the_text_stays(tmp_path: Path, name: str) -> None:
    """Text that repeats is learnt; the folder says what was trained, and the text is mlx-lm's."""
    listener = Remembering()
    changes = {"steps": 40, "learning_rate": 5e-3, "draft_vocab": 0, "measure_every": 0, **SHAPES[name]}
    trainer = shaped(tmp_path / "heads", listener, **changes)
    assert trainer.run() and trainer.agreement is not None
    losses = [report.loss for report in listener.steps]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5]), losses
    config = config_of(tmp_path / "heads", read_header(tmp_path / "heads"))
    assert config.drafts == 3 and config.count == (1 if SHAPES[name].get("shared") else 3)
    save_tiny(tmp_path / "model", "qwen3", seed=3)
    base, tokenizer = mlx_lm.load(str(tmp_path / "model"))[:2]
    expected = mlx_lm.generate(base, tokenizer, "The sky", max_tokens=30)
    attached, tokenizer = load(str(tmp_path / "model"), tmp_path / "heads")
    assert attached.most_drafts == 3
    responses = list(stream_generate(attached, tokenizer, "The sky", 30, layout="linear"))
    assert "".join(response.text for response in responses) == expected
    attached.detach()
    assert mlx_lm.generate(attached.model, tokenizer, "The sky", max_tokens=30) == expected


@pytest.mark.parametrize("name", SHAPES)
def test_decoding_accepts_what_the_measurement_says(tmp_path: Path, name: str) -> None:
    check_drafts(tmp_path / "heads", lambda: tiny_model("qwen3", seed=3), **SHAPES[name])


def test_on_a_quantised_base(tmp_path: Path) -> None:
    """Trained on it, stored, and loaded for another copy of it; the text is that of a run without drafts."""

    def build() -> Any:
        model = tiny_model("qwen3", seed=3, hidden_size=64, intermediate_size=96)
        nn.quantize(model, group_size=32, bits=4)
        return model

    assert shaped(tmp_path / "heads", model=build(), steps=6, **SHAPES["all"]).run()
    model, stats = build(), DecodeStats()
    plain = [item.token for item in mtp_generate_step([5, 9, 2], attach(build()), max_tokens=30)]
    heads, _ = load_folder(tmp_path / "heads", model)
    steps = mtp_generate_step(
        [5, 9, 2], attach(model, heads), max_tokens=30, policy=ChainPolicy(3), stats=stats
    )
    assert [item.token for item in steps] == plain and sum(stats.submitted) > 0


def test_a_folder_says_its_shape(every: Path) -> None:
    header = read_header(every)
    section = json.loads((every / "mtp_config.json").read_text())["heads"]
    assert section["count"] == 1 and section["drafts"] == 3 and section["taps"] == [1, 2]
    assert section["blocks"] == [{"like": "last layers", "layers": 2}]
    facts = folder_facts(every, header)
    assert (facts["heads"], facts["drafts"], facts["layers"]) == (1, 3, "2")
    assert facts["reads"] == "the states after layers 1, 2 and after the last norm"
    card = (every / "README.md").read_text()
    assert (
        "draft 3 token(s) a step and read the states after layers 1, 2 and after the last norm, trained"
        in card
    )
    heads, _ = load_folder(every, tiny_model("qwen3", seed=3))
    assert heads.tapped_layers == (1, 2) and len(heads.heads[0].layers) == 2 and heads.drafts == 3


def test_folders_from_before_have_no_taps(tmp_path: Path) -> None:
    folder = tmp_path / "heads"
    assert shaped(folder, steps=3).run()
    config = json.loads((folder / "mtp_config.json").read_text())
    del config["heads"]["taps"]
    (folder / "mtp_config.json").write_text(json.dumps(config))
    heads, header = load_folder(folder, tiny_model("qwen3", seed=3))
    assert (
        heads.tapped_layers == () and folder_facts(folder, header)["reads"] == "the state after the last norm"
    )


@pytest.mark.parametrize(
    ("taps", "message"),
    [([2, 1], "not ascending"), (["low"], "not ascending"), ([1, 7], "read what layers 1, 7 return")],
)
def test_damaged_taps(tmp_path: Path, every: Path, taps: Any, message: str) -> None:
    config = json.loads((every / "mtp_config.json").read_text())
    config["heads"]["taps"] = taps
    folder = tmp_path / "heads"
    folder.mkdir()
    (folder / "mtp_config.json").write_text(json.dumps(config))
    (folder / "mtp.safetensors").write_bytes((every / "mtp.safetensors").read_bytes())
    model = tiny_model("qwen3", seed=3)
    with pytest.raises(MTPError, match=message):
        attach(model, load_folder(folder, model)[0])


@pytest.mark.parametrize("quantized", [False, True])
def test_new_heads_start_as_without_taps(quantized: bool) -> None:
    """Their first drafts are those of heads that read the last state alone, and lower states can be learnt from."""
    model = tiny_model("qwen3", seed=3, hidden_size=64, intermediate_size=96)
    if quantized:
        nn.quantize(model, group_size=32, bits=8)
    convention = HeadConvention("test")
    plain, tapped = new_heads(model, 2, convention), new_heads(model, 2, convention, taps=(1, 2))
    for heads in (plain, tapped):
        start_like_trunk(heads, model, [5, 9, 2, 77])
    tokens = mx.array([[5, 9, 2, 77, 140, 3]])
    embeddings = model.model.embed_tokens(tokens)
    states = attach(model, tapped).states_of(tokens)
    for one, other in zip(
        plain.cascade(embeddings, states[..., -64:]), tapped.cascade(embeddings, states), strict=True
    ):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-3, atol=1e-3)
    loss = nn.value_and_grad(tapped, lambda: mx.sum(tapped.cascade(embeddings, states)[0] ** 3))
    gradient = loss()[1]["fusion"]["fuse"]["weight"]
    assert mx.abs(gradient[:, : 2 * 64]).max().item() > 1e-4


def test_a_head_of_two_layers_starts_as_the_trunk_s_last_two() -> None:
    model = tiny_model("qwen3", seed=3, num_hidden_layers=4)
    head = new_heads(model, 1, HeadConvention("test"), layers=2).heads[0]
    for layer, own in zip(model.model.layers[2:], head.layers, strict=True):
        for name, value in flat(layer.parameters()).items():
            assert np.array_equal(flat(own.parameters())[name], value), name
    with pytest.raises(MTPError, match=r"a head of 5 layers needs as many .* this model has 4"):
        new_heads(model, 1, HeadConvention("test"), layers=5)


def test_layers_with_recurrent_state_are_not_copied() -> None:
    """Qwen3-Next has attention in every other layer here; a head is rolled back by keys and values."""
    model = tiny_model("qwen3_next", seed=3, num_hidden_layers=4, full_attention_interval=2)
    assert last_layers(model.model, 2) == [1, 3]
    heads = new_heads(model, 1, HeadConvention("test"), layers=2)
    assert [layer.is_linear for layer in heads.heads[0].layers] == [False, False]


@pytest.mark.parametrize(
    ("taps", "layers", "numbers"),
    [
        ("last", 30, ()),
        ("low,middle,last", 30, (2, 15)),
        ("last, high ,low", 32, (2, 29)),
        ("low,middle,high,last", 2, (1, 2)),
        ("7,3,last", 8, (3, 7)),
        ("low,middle,last", 1, (1,)),
    ],
)
def test_names_of_layers(taps: str, layers: int, numbers: tuple[int, ...]) -> None:
    assert layer_numbers(taps, layers) == numbers


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ("low,middle", "leaves out 'last', the state that every head reads"),
        ("low,top,last", "`taps` has 'top': give low, middle, high, last or numbers of layers"),
        ("9,last", "`taps` names layer 9, and the model has layers 1 to 4"),
        ("0,last", "`taps` names layer 0"),
        ("", "leaves out 'last'"),
    ],
)
def test_names_that_are_none(taps: str, message: str) -> None:
    with pytest.raises(MTPError, match=message):
        layer_numbers(taps, 4)


def test_fusion_normalises_each_state() -> None:
    """A state a thousand times larger than the others is not louder."""
    fusion = TapFusion((1,), 8, 1e-5)
    fusion.fuse.weight = mx.random.normal((8, 16), key=mx.random.key(0))
    states = mx.random.normal((2, 3, 16), key=mx.random.key(1))
    louder = mx.concatenate([states[..., :8] * 1000, states[..., 8:]], axis=-1)
    np.testing.assert_allclose(np.array(fusion(states)), np.array(fusion(louder)), rtol=1e-3, atol=1e-3)


# --- training goes on ---------------------------------------------------------------------------------------


def test_start_from_keeps_the_shape(tmp_path: Path, every: Path) -> None:
    listener = Remembering()
    second = shaped(tmp_path / "second", listener, start_from=every, steps=3, heads=5)
    assert f"the heads of {every} made 3 draft(s) a step; they are trained for 5" in listener.messages
    assert second.run()
    config = config_of(tmp_path / "second", read_header(tmp_path / "second"))
    assert (config.count, config.drafts, config.taps) == (1, 5, [1, 2])
    assert config.blocks == [{"like": "last layers", "layers": 2}]
    assert shaped(tmp_path / "third", start_from=every, **SHAPES["all"]).method.depth == 3
    for changes, message in (
        ({"layers": 1}, "has heads of 2 layer.s., and `layers` is 1: leave `layers` out"),
        (
            {"taps": "last"},
            "has heads that read 1,2,last, and `taps` is last: leave `taps` out, or name these",
        ),
        ({"extend": "2x", "heads": None}, "has one head for all drafts, which `extend` would copy"),
        ({"shared": False}, "has 1 heads, and `heads` is 3"),
    ):
        with pytest.raises(MTPError, match=message):
            shaped(tmp_path / "other", start_from=every, **changes)


def test_the_first_head_goes_on_as_shared(tmp_path: Path) -> None:
    for heads in (1, 2):
        assert shaped(tmp_path / f"{heads}", steps=3, heads=heads).run()
        listener, out = Remembering(), tmp_path / f"shared-{heads}"
        shared = shaped(out, listener, start_from=tmp_path / f"{heads}", shared=True, heads=3, steps=3)
        assert shared.method.depth == 3 and len(shared.method.module.heads) == 1
        first = load_tensors(tmp_path / f"{heads}")["heads.0.fuse.weight"].astype(mx.float32)
        assert mx.array_equal(shared.method.module.heads[0].fuse.weight, first)
        assert any("the first one is trained" in line for line in listener.messages) == (heads == 2)
        assert shared.run()
        config = config_of(out, read_header(out))
        assert (config.count, config.drafts, len(config.blocks)) == (1, 3, 1)
    with pytest.raises(MTPError, match="`extend` copies one head after another, and `shared` heads are one"):
        settings_for(
            tmp_path / "no", "mtp-heads", start_from=tmp_path / "2", shared=True, extend="2x", heads=None
        )


def test_states_are_added_without_changing_what_heads_say(tmp_path: Path) -> None:
    """From the last state alone, and from one tap to two; then the new states are learned from."""
    before = tmp_path / "before"
    assert shaped(before, steps=3, heads=2).run()
    for name, taps, numbers in (("one", "2,last", [2]), ("two", "1,2,last", [1, 2])):
        listener, out = Remembering(), tmp_path / name
        grown = shaped(out, listener, start_from=before, heads=None, taps=taps, steps=3)
        assert any("as well from now on" in line for line in listener.messages)
        plain = shaped(tmp_path / "plain", start_from=before, heads=None, steps=3)
        np.testing.assert_allclose(taken(grown), taken(plain), atol=1e-4)
        assert grown.run()
        config = config_of(out, read_header(out))
        assert config.taps == numbers
        assert mx.any(load_tensors(out)["fusion.fuse.weight"][:, :48] != 0)
        before = out


def test_the_number_of_heads_is_never_dropped(tmp_path: Path, every: Path) -> None:
    """The usual number is one like any other: where it contradicts the folder, it is refused."""
    assert shaped(tmp_path / "two", steps=1, warmup=0, heads=2).run()
    assert shaped(tmp_path / "one", steps=1, warmup=0, heads=1).run()
    with pytest.raises(MTPError, match="has 2 heads, and `heads` is 4"):
        shaped(tmp_path / "no", start_from=tmp_path / "two", heads=4)
    assert shaped(tmp_path / "a", start_from=every, heads=4).method.depth == 4
    assert shaped(tmp_path / "b", start_from=every, heads=None).method.depth == 3
    listener = Remembering()
    shared = shaped(tmp_path / "c", listener, start_from=tmp_path / "one", heads=None, shared=True)
    assert shared.method.depth == 4
    assert (
        f"the heads of {tmp_path / 'one'} made 1 draft(s) a step; they are trained for 4" in listener.messages
    )
    with pytest.raises(MTPError, match="`extend` says how many heads there will be: leave `heads` out"):
        settings_for(tmp_path / "no", "mtp-heads", start_from=tmp_path / "two", extend="4", heads=4)


def test_rows_must_be_as_long_as_the_heads_of_the_folder_need(tmp_path: Path) -> None:
    """Sixteen heads take 18 tokens; two from a folder take 4, whatever the usual number is."""
    assert shaped(tmp_path / "two", steps=1, warmup=0, heads=2).run()
    assert shaped(tmp_path / "eight", steps=1, warmup=0, shared=True, heads=8).run()
    assert shaped(tmp_path / "a", start_from=tmp_path / "two", heads=None, max_length=8).method.depth == 2
    with pytest.raises(MTPError, match="`max_length` 8 is too short for 8 heads, which take 10 tokens: set"):
        shaped(tmp_path / "b", start_from=tmp_path / "eight", heads=None, max_length=8)


def test_heads_that_a_folder_does_not_use_are_trained_too(tmp_path: Path) -> None:
    """Three heads of which two draft: training makes it three, and says so."""
    assert shaped(tmp_path / "a", steps=1, warmup=0).run()
    path, listener = tmp_path / "a" / "mtp_config.json", Remembering()
    config = json.loads(path.read_text())
    config["heads"]["drafts"] = 2
    path.write_text(json.dumps(config))
    trainer = shaped(tmp_path / "b", listener, start_from=tmp_path / "a", heads=None, steps=2, warmup=0)
    assert (
        f"the heads of {tmp_path / 'a'} made 2 draft(s) a step; they are trained for 3" in listener.messages
    )
    before = {name: np.array(value) for name, value in trainer.method.tensors().items()}
    assert trainer.run()
    for name, value in trainer.method.tensors().items():
        assert not np.array_equal(np.array(value), before[name]), name
    assert config_of(tmp_path / "b", read_header(tmp_path / "b")).drafts == 3


def test_an_extension_keeps_layers_and_taps(tmp_path: Path) -> None:
    """What joins the states is frozen with the first group; the new group has as many layers."""
    assert shaped(tmp_path / "two", steps=3, heads=2, layers=2, taps="1,last").run()
    four = shaped(tmp_path / "four", start_from=tmp_path / "two", extend="2x", heads=None, steps=4)
    before = {name: np.array(value) for name, value in four.method.tensors().items()}
    assert four.run()
    for name, value in four.method.tensors().items():
        frozen = name.startswith("fusion") or name.split(".")[1] in "01"
        assert np.array_equal(np.array(value), before[name]) == frozen, name
    heads, header = load_folder(tmp_path / "four", tiny_model("qwen3", seed=3))
    assert [len(head.layers) for head in heads.heads] == [2] * 4 and heads.tapped_layers == (1,)
    assert config_of(tmp_path / "four", header).drafts == 4


def test_a_run_goes_on_after_a_stop(tmp_path: Path) -> None:
    whole = shaped(tmp_path / "whole", steps=4, save_every=2, **SHAPES["all"])
    assert whole.run()
    first = shaped(tmp_path / "cut", steps=4, save_every=2, **SHAPES["all"])
    first._one_step()
    first._one_step()
    first.save()
    second = shaped(tmp_path / "cut", steps=4, save_every=2, **SHAPES["all"])
    assert second.resume() and second.step == 2 and second.run()
    for name, value in whole.method.tensors().items():
        assert mx.array_equal(value, second.method.tensors()[name]), name


# --- elsewhere ----------------------------------------------------------------------------------------------


def test_costs_are_measured_with_taps(every: Path) -> None:
    model = tiny_model("qwen3", seed=3)
    assert (measure(attach(model, load_folder(every, model)[0]), 60.0).draft or 0.0) > 0


def test_the_speculators_layout_has_no_place_for_them(tmp_path: Path, every: Path) -> None:
    with pytest.raises(MTPError, match="no place for heads of several layers, or that read several states"):
        export_speculators(every, tmp_path / "out", base=tiny_config("qwen3"))
    assert not (tmp_path / "out").exists()
