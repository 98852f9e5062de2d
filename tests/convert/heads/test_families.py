"""Proves that each family's heads become the canonical tensors exactly, in the shapes of mlx-lm's own layers."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.convert.heads.plan import Overrides, find_heads, plan_heads
from mtp_mlx.convert.heads.targets import HeadPlan
from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.errors import ConversionError
from tests.convert.checkpoints import bf16, write_safetensors
from tests.convert.heads.head_cases import CASES
from tests.convert.heads.head_checkpoints import make, model_config, numbers
from tests.convert.heads.head_configs import D, V


def converted(folder: Path, norms: str = "auto") -> tuple[HeadPlan, dict[str, np.ndarray]]:
    """The plan of a folder and its canonical tensors in float32."""
    checkpoint = open_checkpoint(folder)
    plan = plan_heads(checkpoint, find_heads(checkpoint), Overrides(norms))
    tensors = checkpoint.tensors
    return plan, {target.name: target.build(tensors) for target in plan.targets}


@pytest.mark.parametrize("name", list(CASES))
def test_every_family_becomes_canonical(tmp_path: Path, name: str) -> None:
    made = make(name)
    plan, found = converted(made.write(tmp_path / "model"))
    assert found.keys() == made.canonical.keys()
    for key, value in made.canonical.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    case = CASES[name]
    convention = plan.convention
    assert plan.count == case.heads and convention.family == case.family
    assert convention.stored_order == case.order and convention.zero_centred_norms == case.zero_centred
    assert {stored for stored, _ in plan.dropped} == {key.format(n=4) for key in case.copies}


@pytest.mark.parametrize("name", list(CASES))
def test_the_written_block_builds_in_mlx_lm(tmp_path: Path, name: str) -> None:
    """What mtp_config.json says is enough to build the layer, whose parameters are exactly the tensors."""
    made = make(name)
    plan, found = converted(made.write(tmp_path / "model"))
    config = json.loads(json.dumps(plan.model_config))
    for i, block in enumerate(json.loads(json.dumps([block.to_json() for block in plan.blocks]))):
        module = importlib.import_module(block["module"])
        args = getattr(module, block["args_class"]).from_dict({**config, **block["overrides"]})
        wanted = {}
        for j, arguments in enumerate(block["layers"]):
            layer = getattr(module, block["class"])(args, **arguments)
            prefix = f"heads.{i}.block.{j}." if len(block["layers"]) > 1 else f"heads.{i}.block."
            wanted |= {prefix + key: value.shape for key, value in tree_flatten(layer.parameters())}
        here = {key: value.shape for key, value in found.items() if key.startswith(f"heads.{i}.block.")}
        assert here == wanted


# What docs/checkpoints.md says of each family: state that goes in first, state recycled, embedding of position 0
# zeroed, output norm, embedding, LM head.
CONVENTIONS = {
    "qwen": ("post-norm", "normed", False, "own", "shared", "shared"),
    "deepseek-v3": ("post-norm", "normed", True, "own", "shared", "shared"),
    "glm-4.5": ("post-norm", "normed", True, "own", "shared", "shared"),
    "ling": ("post-norm", "normed", False, "own", "shared", "shared"),
    "mimo": ("pre-norm", "normed", True, "own", "shared", "shared"),
    "fastmtp": ("post-norm", "normed", False, "own", "shared", "shared"),
    "mimo-v2": ("post-norm", "trunk", False, "own", "shared", "shared"),
    "ernie-4.5": ("post-norm", "normed", False, "trunk", "shared", "shared"),
    "exaone-moe": ("post-norm", "normed", False, "own", "shared", "shared"),
    "longcat-flash": ("post-norm", "normed", False, "own", "own", "shared"),
    "nemotron-h": ("post-norm", "normed", False, "own", "shared", "shared"),
    "step-3.5": ("pre-norm", "raw", False, "own", "shared", "own"),
    "kimi-k3": ("pre-norm", "raw", True, "own", "shared", "shared"),
    "speculators": ("post-norm", "normed", False, "own", "shared", "shared"),
}
UNSETTLED = {
    "deepseek-v3": {"mask_first_position"},
    "kimi-k3": {"mask_first_position"},
    "glm-4.5": {"recycled_hidden", "mask_first_position"},
    "mimo": {"first_hidden", "recycled_hidden", "mask_first_position"},
    "mimo-v2": {"first_hidden", "recycled_hidden"},
    "ernie-4.5": {"first_hidden", "recycled_hidden", "mask_first_position", "output_norm"},
    "step-3.5": {"first_hidden", "recycled_hidden"},
}


@pytest.mark.parametrize("name", list(CASES))
def test_every_field_of_the_convention_is_written_down(tmp_path: Path, name: str) -> None:
    plan, _ = converted(make(name).write(tmp_path / "model"))
    found = plan.convention
    fields = (found.first_hidden, found.recycled_hidden, found.mask_first_position, found.output_norm)
    assert (*fields, found.embedding, found.lm_head) == CONVENTIONS[found.family]
    assert (found.kind, found.rope_position) == ("cascade", "hidden")
    assert set(found.unsettled) == UNSETTLED.get(found.family, set())


def test_wrong_conventions_give_other_tensors(tmp_path: Path) -> None:
    """The comparison above fails for a wrong order of concatenation and for norms of the other kind."""
    made = make("mimo-7b")
    folder = made.write(tmp_path / "order")
    stored = made.stored["model.mtp_layers.0.input_proj.weight"]
    assert not np.array_equal(stored, made.canonical["heads.0.fuse.weight"])
    np.testing.assert_array_equal(converted(folder)[1]["heads.0.fuse.weight"][:, :D], stored[:, D:])
    made = make("qwen3-next experts")
    folder = made.write(tmp_path / "norms")
    for norms, shift in (("plain", 0), ("zero-centred", 1)):
        plan, found = converted(folder, norms)
        assert plan.convention.zero_centred_norms == bool(shift)
        for key in (
            "heads.0.norm_hidden.weight",
            "heads.0.norm_out.weight",
            "heads.0.block.self_attn.q_norm.weight",
        ):
            np.testing.assert_array_equal(found[key], made.canonical[key] - 1 + shift)
        gate = "heads.0.block.mlp.shared_expert_gate.weight"
        np.testing.assert_array_equal(found[gate], made.canonical[gate])
    plan, found = converted(make("glm-4.5").write(tmp_path / "glm"), "zero-centred")
    key = "heads.0.norm_embedding.weight"
    np.testing.assert_array_equal(found[key], make("glm-4.5").canonical[key] + 1)


def test_norms_of_a_file_that_mlx_lm_converted(tmp_path: Path) -> None:
    """With a converted trunk the heads' norms may have either form; the trunk's q and k norms tell which."""
    made = make("qwen3-next experts")
    made.stored["model.layers.0.linear_attn.conv1d.weight"] = np.ones((8, 4, 1), np.float32)
    gain = numbers("gain", (16,)) / 4 + 1.5  # what real gains look like
    made.stored["model.layers.3.self_attn.q_norm.weight"] = gain
    for shift in (0, 1):  # copied unchanged from the original, or shifted together with the trunk
        for part in ("q", "k"):
            made.stored[f"mtp.layers.0.self_attn.{part}_norm.weight"] = gain - 1 + shift
        plan, found = converted(made.write(tmp_path / f"m{shift}"))
        np.testing.assert_array_equal(found["heads.0.block.self_attn.q_norm.weight"], gain)
        assert plan.convention.zero_centred_norms == (shift == 0) and "the trunk is mlx-lm's" in plan.notes[0]
    del made.stored["model.layers.3.self_attn.q_norm.weight"]
    with pytest.raises(ConversionError, match="give `head_norms` plain"):
        converted(made.write(tmp_path / "unknown"))


def test_bfloat16_heads_stay_bfloat16(tmp_path: Path) -> None:
    made = make("qwen3.5 dense")
    folder = tmp_path / "model"
    folder.mkdir()
    stored = {name: bf16(value) for name, value in made.stored.items()}
    write_safetensors(folder / "model.safetensors", stored, dict.fromkeys(stored, "BF16"))
    (folder / "config.json").write_text(json.dumps(made.config))
    _, found = converted(folder)
    for key, value in made.canonical.items():
        np.testing.assert_array_equal(found[key], bf16(value), err_msg=key)


def test_fp8_weights_of_a_head_are_dequantised(tmp_path: Path) -> None:
    made = make("deepseek-v3")
    key = "model.layers.4.self_attn.q_a_proj.weight"
    codes = np.full(made.stored[key].shape, 0x38, np.uint8)  # 1.0
    stored = {**made.stored, key: codes, f"{key}_scale_inv": np.full((1, 1), 0.25, np.float32)}
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", stored, {key: "F8_E4M3"})
    (folder / "config.json").write_text(json.dumps(made.config))
    _, found = converted(folder)
    np.testing.assert_array_equal(
        found["heads.0.block.self_attn.q_a_proj.weight"], bf16(np.full(codes.shape, 0.25))
    )


def test_a_copy_is_dropped_only_if_every_byte_is_the_same(tmp_path: Path) -> None:
    made = make("deepseek-v3")
    for changed, field, part in (
        ("model.layers.4.embed_tokens.weight", "embedding", "embed_tokens"),
        ("model.layers.4.shared_head.head.weight", "lm_head", "lm_head"),
    ):
        stored = dict(made.stored)
        stored[changed] = stored[changed].copy()
        stored[changed][-1, -1] += 2.0**-20
        plan, found = converted(dataclasses.replace(made, stored=stored).write(tmp_path / part))
        assert getattr(plan.convention, field) == "own" and len(plan.dropped) == 1
        np.testing.assert_array_equal(found[f"heads.0.{part}.weight"], stored[changed])
    # Without a trunk nothing can be compared, so both are kept.
    stored = {name: value for name, value in made.stored.items() if name.startswith("model.layers.4.")}
    plan, found = converted(dataclasses.replace(made, stored=stored).write(tmp_path / "alone"))
    assert (plan.convention.embedding, plan.convention.lm_head, plan.dropped) == ("own", "own", [])
    # A tied model has no LM head of its own: the copy is that of the embedding.
    stored = dict(made.stored)
    del stored["lm_head.weight"]
    stored["model.layers.4.shared_head.head.weight"] = stored["model.embed_tokens.weight"]
    plan, _ = converted(
        dataclasses.replace(made, stored=stored).write(tmp_path / "tied", tie_word_embeddings=True)
    )
    assert ("model.layers.4.shared_head.head.weight", "model.embed_tokens.weight") in plan.dropped


@pytest.mark.parametrize("second", ["a copy", "absent"])
def test_one_head_with_an_lm_head_of_its_own(tmp_path: Path, second: str) -> None:
    """One convention holds for all heads, so the other's copy of the trunk's is not left out."""
    made = make("llama with own heads")
    trunk = made.stored["lm_head.weight"]
    made.stored["model.layers.4.shared_head.head.weight"] = trunk + (trunk == trunk[0, 0]) * np.float32(2**-9)
    if second == "a copy":
        made.stored["model.layers.5.shared_head.head.weight"] = trunk.copy()
    else:
        made.stored.pop("model.layers.5.shared_head.head.weight", None)
    plan, found = converted(made.write(tmp_path / "model"))
    assert plan.convention.lm_head == "own"
    assert not [name for name, _ in plan.dropped if "shared_head.head" in name]
    assert not np.array_equal(found["heads.0.lm_head.weight"], trunk)
    np.testing.assert_array_equal(found["heads.1.lm_head.weight"], trunk)


def test_an_own_embedding_that_is_the_trunks_is_shared(tmp_path: Path) -> None:
    made = make("longcat-flash")
    made.stored["model.mtp.embed_tokens.weight"] = made.stored["model.embed_tokens.weight"]
    plan, found = converted(made.write(tmp_path / "model"))
    assert plan.convention.embedding == "shared" and "heads.0.embed_tokens.weight" not in found


def test_all_problems_are_in_one_error(tmp_path: Path) -> None:
    made = make("glm-4.5")
    head = "model.layers.4."
    del made.stored[f"{head}enorm.weight"]
    made.stored[f"{head}mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    made.stored[f"{head}self_attn.k_proj.bias"] = np.zeros(31, np.float32)
    made.stored[f"{head}mlp.experts.1.up_proj.weight"] = np.zeros((24, D), np.int32)
    made.stored[f"{head}shared_head.norm.weight"] = np.zeros(
        D, np.float16
    )  # another float type is no problem
    made.stored[f"{head}odd.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ConversionError) as caught:
        converted(made.write(tmp_path / "model"))
    message = str(caught.value)
    assert "tensors of the heads do not fit GLM-4.5" in message and "(5): " in message
    assert f"missing {head}enorm.weight [48]" in message
    assert f"unexpected {head}mlp.up_proj.weight [2, 2]" in message
    assert f"{head}self_attn.k_proj.bias is [31], [32] expected" in message
    assert f"{head}mlp.experts.1.up_proj.weight is of type I32, a float type expected" in message
    assert f"unexpected {head}odd.weight [3]" in message and "shared_head.norm" not in message


def test_announced_heads_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    made = make("qwen3-next experts")
    made.stored = {name: value for name, value in made.stored.items() if not name.startswith("mtp.")}
    with pytest.raises(ConversionError, match=r"announces 1 MTP head\(s\), but none is in the file"):
        converted(made.write(tmp_path / "model"))
    with pytest.raises(ConversionError, match="holds no MTP heads of a known kind"):
        converted(made.write(tmp_path / "none", num_nextn_predict_layers=0))


def test_known_layouts_of_other_models_are_refused_by_name(tmp_path: Path) -> None:
    made = make("glm-4.5")
    with pytest.raises(
        ConversionError,
        match="have names like model.layers.{n}.eh_proj.weight, but .* 'glm9'; .* of bailing_hybrid, bailing_moe, ",
    ):
        converted(made.write(tmp_path / "a", model_type="glm9"))
    for name, title in (
        ("mtp.0.e_proj.weight", "DeepSeek-V4"),
        ("midlayer.hidden_norm.weight", "EAGLE-3"),
        ("hydra_mlp.0.0.linear.weight", "Hydra"),
    ):
        folder = tmp_path / title
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", {name: np.ones(1, np.float32)})
        with pytest.raises(ConversionError, match=f"the heads are {title}.* not supported"):
            converted(folder)


def test_a_configuration_that_lacks_a_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="the configuration lacks 'kv_lora_rank'"):
        converted(make("deepseek-v3").write(tmp_path / "a", kv_lora_rank=None))
    with pytest.raises(ConversionError, match="mtp_hybrid_override_pattern is 'M'"):
        converted(make("nemotron-h").write(tmp_path / "b", mtp_hybrid_override_pattern="M"))
    with pytest.raises(ConversionError, match="layer_types has only 4 entries, and the MTP head is layer 4"):
        converted(make("step-3.5").write(tmp_path / "c", layer_types=["full_attention"] * 4))


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_other_setting": {"num_attention_heads": 6}},
        {"layer_types": 3},
        {"num_hidden_layers": "four"},
        {"hidden_size": "48"},
        {"num_hidden_layers": float("inf")},
    ],
)
def test_a_configuration_of_nonsense_is_one_sentence(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(ConversionError, match="does not describe such a model|the configuration lacks"):
        converted(make("step-3.5").write(tmp_path / "model", **settings))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("glm-4.5", {"num_attention_heads": 0, "head_dim": None}, "does not describe such a model"),
        ("longcat-flash", {"q_lora_rank": 0, "mla_scale_q_lora": True}, "does not describe such a model"),
        (
            "deepseek-v3",
            {"n_routed_experts": 10**12},
            "says 1,000,000,000,000 experts, too many for 32 tensors",
        ),
        ("deepseek-v3", {"n_routed_experts": 0}, "says 0 experts"),
    ],
)
def test_impossible_numbers_are_one_sentence(
    tmp_path: Path, name: str, settings: dict[str, object], message: str
) -> None:
    """Neither a division by zero nor a list of a million million experts."""
    with pytest.raises(ConversionError, match=message):
        converted(make(name).write(tmp_path / "model", **settings))


@pytest.mark.parametrize("lost", [4, 5])
def test_heads_after_a_lost_one_do_not_take_its_place(tmp_path: Path, lost: int) -> None:
    """Of three heads one has lost its fuse weight, which a head is recognised by."""
    made = make("llama with own heads")
    third = {n.replace("layers.5.", "layers.6."): v for n, v in made.stored.items() if "layers.5." in n}
    made.stored |= third
    del made.stored[f"model.layers.{lost}.eh_proj.weight"]
    with pytest.raises(ConversionError, match=f"that at layer {lost} is missing or incomplete"):
        converted(made.write(tmp_path / "model"))


def test_what_sets_fastmtp_apart(tmp_path: Path) -> None:
    """MiMo-7B's names, other conventions: settings of its training say which it is, and how many drafts it makes."""
    plan, _ = converted(make("fastmtp").write(tmp_path / "fast"))
    assert (plan.convention.family, plan.count, plan.drafts) == ("fastmtp", 1, 3)
    plan, _ = converted(make("fastmtp").write(tmp_path / "plain", mtp_loss_step_weights=None))
    assert (plan.convention.family, plan.drafts) == ("mimo", 0)
    plan, _ = converted(make("mimo-7b").write(tmp_path / "mimo"))
    assert (plan.convention.family, plan.count, plan.drafts) == ("mimo", 1, 0)


def test_words_for_the_layers_of_nemotron_heads(tmp_path: Path) -> None:
    made = make("nemotron-h")
    words = {"mtp_hybrid_override_pattern": None, "mtp_layers_block_type": ["attention", "moe"]}
    for known in (["attention", "moe"], ["full_attention", "moe"], None):  # None: attention, then experts
        folder = made.write(tmp_path / "words", **words | {"mtp_layers_block_type": known})
        assert converted(folder)[1].keys() == made.canonical.keys()
    folder = made.write(tmp_path / "odd", **words | {"mtp_layers_block_type": ["attention", "mamba"]})
    with pytest.raises(ConversionError, match="one of them must give"):
        converted(folder)


def test_windows_of_exaone_heads(tmp_path: Path) -> None:
    made = make("exaone-moe")
    for said, window in ((None, 8), ([5], 5), ([0], 8), ([], 8), (["5"], 8), (5, 8)):
        plan, _ = converted(made.write(tmp_path / "model", mtp_sliding_windows=said))
        assert [block.window for block in plan.blocks] == [window]


def test_fused_queries_of_mimo_v2_pro_are_refused(tmp_path: Path) -> None:
    made = make("mimo-v2")
    made.stored["model.mtp.layers.0.self_attn.qkv_proj.weight"] = numbers("qkv", (4, 48))
    with pytest.raises(ConversionError, match="one tensor, as in MiMo-V2-Pro, which is not supported"):
        converted(made.write(tmp_path / "model"))


def test_another_number_of_heads_is_noted(tmp_path: Path) -> None:
    plan, _ = converted(make("mimo-v2").write(tmp_path / "model", num_nextn_predict_layers=1))
    assert plan.count == 3 and "announces 1 head(s), the file holds 3" in plan.notes[0]


def test_multi_modal_names(tmp_path: Path) -> None:
    """Nemotron-H's multi-modal files put language_model. before everything."""
    made = make("nemotron-h")
    made.stored = {f"language_model.{name}": value for name, value in made.stored.items()}
    _, found = converted(made.write(tmp_path / "model"))
    assert found.keys() == made.canonical.keys()


def test_model_config_of_the_cases() -> None:
    assert all(model_config(case)["vocab_size"] == V for case in CASES.values())
