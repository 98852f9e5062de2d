"""Checkpoints of the released PTP code, whole and adapter-only and in both spellings, become folders that decode;
slots compute what an independent numpy forward computes; what cannot be run is refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result
from mlx_lm.utils import load_model

from mtp_mlx.adapter_folder import read_header
from mtp_mlx.api import load
from mtp_mlx.cli import main
from mtp_mlx.convert.adapters.ptp import write_ptp
from mtp_mlx.convert.adapters.ptp_plan import is_ptp_checkpoint
from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.drafters.ptp.config import TeacherSampling
from mtp_mlx.drafters.ptp.folder import config_of
from mtp_mlx.errors import MTPError
from mtp_mlx.model.block import Block, block_shape
from tests.convert.checkpoints import write_safetensors
from tests.convert.read.torch_files import write_torch
from tests.drafters.ptp.ptp_numpy import embed_uniform, logits
from tests.tiny import save_tiny

RANK, WIDTH = 3, 48
SIZES = {
    "self_attn.q_proj": (48, 64),
    "self_attn.k_proj": (48, 32),
    "self_attn.v_proj": (48, 32),
    "self_attn.o_proj": (64, 48),
    "mlp.gate_proj": (48, 80),
    "mlp.up_proj": (48, 80),
    "mlp.down_proj": (80, 48),
}
RNG = np.random.default_rng(2)


def numbers(*shape: int) -> np.ndarray:
    return (0.4 * RNG.normal(size=shape)).astype(np.float32)


LOW_RANK = {
    f"layers.{i}.{name}.{part}": numbers(RANK, inputs) if part == "A" else numbers(outputs, RANK)
    for i in range(2)
    for name, (inputs, outputs) in SIZES.items()
    for part in "AB"
}
KNOTS = {"embedding.weight": numbers(3, WIDTH)}
LINEAR = {"weight": numbers(WIDTH, 32), "bias": numbers(WIDTH)}


def state(root: str, embedding: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by the names of the released code."""
    names = {}
    for name, value in LOW_RANK.items():
        path, part = name.rsplit(".", 1)
        names[f"{root}.model.base_model.model.model.{path}.lora_{part}.default.weight"] = value
    return names | embedding


def new_linear() -> dict[str, np.ndarray]:
    return state("model", {f"model.u_embed.u_adapter.{key}": value for key, value in LINEAR.items()})


def legacy_linear() -> dict[str, np.ndarray]:
    return state("student", {f"student.u_adapter.u_adapter.{key}": value for key, value in LINEAR.items()})


def renamed_linear() -> dict[str, np.ndarray]:
    """What the code's own loader makes of the legacy spelling."""
    return state("model", {f"model.u_embed.u_embed.{key}": value for key, value in LINEAR.items()})


def new_knots() -> dict[str, np.ndarray]:
    return state("model", {f"model.u_embed.{key}": value for key, value in KNOTS.items()})


def legacy_knots() -> dict[str, np.ndarray]:
    return state("student", {f"student.u_adapter.{key}": value for key, value in KNOTS.items()})


def lightning(folder: Path, tensors: dict[str, np.ndarray], **hyper: Any) -> Path:
    return write_torch(folder / "last.ckpt", {"state_dict": tensors, "epoch": 1, "hyper_parameters": hyper})


def whole(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the base's own weights among them, as a checkpoint that is not adapter-only has."""
    name = "model.model.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    return tensors | {name: numbers(64, 48), "model.model.base_model.model.lm_head.weight": numbers(157, 48)}


def converted(source: Path, base: Path, out: Path) -> Path:
    """The adapter folder of a student, for the model folder `base`."""
    return write_ptp(open_checkpoint(source), load_model(base)[0], base.name, out)


CASES = {
    "lightning, bits": (lambda f: lightning(f, whole(new_linear()), alpha_of=1), "ieee-bits", "binary", 8.0),
    "lightning, sawtooth": (
        lambda f: lightning(f, new_linear(), model={"adapter_name": "sawtooth"}, lora={"lora_alpha": 6}),
        "sawtooth",
        "sawtooth",
        6.0,
    ),
    "adapter only, bits, legacy": (lambda f: write_torch(f / "a.pt", legacy_linear()), "ieee-bits", "binary", 8.0),
    "adapter only, renamed": (lambda f: write_torch(f / "a.pt", renamed_linear()), "ieee-bits", "binary", 8.0),
    "adapter only, knots": (
        lambda f: write_torch(f / "a.bin", legacy_knots()), "linear-interpolation", "interpolation", 8.0
    ),
    "safetensors, knots": (
        lambda f: write_safetensors(f / "a.safetensors", new_knots()), "linear-interpolation", "interpolation", 8.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_slots_compute_what_numpy_computes(tmp_path: Path, name: str) -> None:
    """Real rows and slot rows of one block, to 1e-4 of the logits; then the folder decodes plain decoding's text."""
    write, embedding, kind, alpha = CASES[name]
    write(tmp_path)
    source = next(p for p in tmp_path.iterdir() if p.is_file())
    base = save_tiny(tmp_path / "base", "llama", seed=3)
    assert is_ptp_checkpoint(open_checkpoint(source))
    out = converted(source, base, tmp_path / "out")
    config = config_of(out, read_header(out))
    assert (config.embedding, config.alpha, config.variant) == (embedding, alpha, "o")
    assert config.teacher == TeacherSampling(0.7, 50, 0.95)
    model, _ = load(str(base), out)
    tokens, uniforms = [3, 14, 15, 92, 65], np.array([0.0, 0.171, 0.53, 0.77, 0.9999], dtype=np.float32)
    cache = model.make_cache()
    mx.eval(model.forward(Block.real(mx.array([tokens[:-1]])), cache))
    shape = block_shape(0, (4,), lead=1)
    block = Block.decode(mx.array(tokens[-1:]), shape, 4, model.vocab_size)
    found = np.array(model.head(model.forward(replace(block, uniforms=mx.array(uniforms)), cache))[0])
    weights = {key: np.array(value) for key, value in mx.load(str(base / "model.safetensors")).items()}
    slots = embed_uniform(LINEAR if kind != "interpolation" else KNOTS, kind, uniforms)
    expected = logits(weights, LOW_RANK, alpha / RANK, tokens, slots, heads=4, kv_heads=2)[len(tokens) - 1 :]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    hot = SamplingConfig(temperature=0.9, seed=1, top_k=50)
    texts = [
        [t.token for t in mtp_generate_step(tokens, model, max_tokens=10, sampling=hot, policy=policy)]
        for policy in (FixedPolicy("plain", 0), FixedPolicy("quadratic", 3))
    ]
    assert texts[0] == texts[1]


REFUSED = {
    "one factor": (lambda s: s.pop(next(k for k in s if "lora_B" in k)), "only one of its two"),
    "time embedding": (lambda s: s.update({"model.time_embed.0.weight": numbers(2, 2)}), "time_embed cannot be run"),
    "no uniforms": (lambda s: [s.pop(k) for k in list(s) if "u_embed" in k], "not a student of Parallel Token"),
    "another base": (
        lambda s: s.update({next(k for k in s if "q_proj.lora_A" in k): numbers(RANK, 50)}), "48, 3\\) expected"
    ),
    "two ranks": (lambda s: s.update({next(k for k in s if "lora_A" in k): numbers(5, 48)}), "ranks \\[3, 5\\]"),
    "32 vectors": (lambda s: s.update({"model.u_embed.embedding.weight": numbers(32, WIDTH)}), "knots"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_run_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    spoil, message = REFUSED[name]
    tensors = new_knots()
    spoil(tensors)
    write_torch(tmp_path / "a.ckpt", {"state_dict": tensors})
    base = save_tiny(tmp_path / "base", "llama", seed=3)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(MTPError, match=message):
        converted(tmp_path / "a.ckpt", base, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_embedding_that_is_not_built_and_an_existing_folder_are_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", seed=3)
    source = lightning(tmp_path, new_linear(), adapter_name="quarter_cos")
    with pytest.raises(MTPError, match="'quarter_cos' are not supported"):
        converted(source, base, tmp_path / "out")
    with pytest.raises(MTPError, match="exists already"):
        converted(source, base, base)


def command(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def test_from_the_command_line(tmp_path: Path) -> None:
    """--heads-only with --base writes the folder; whatever else is asked for is refused in one sentence."""
    base = save_tiny(tmp_path / "base", "llama", seed=3)
    source = lightning(tmp_path, whole(new_linear()))
    plan = command(source, "--dry-run")
    assert plan.exit_code == 0 and "28 low-rank factors" in plan.stdout
    done = command(source, tmp_path / "out", "--heads-only", "--base", base)
    assert done.exit_code == 0, done.output
    assert config_of(tmp_path / "out", read_header(tmp_path / "out")).embedding == "ieee-bits"
    text = CliRunner().invoke(
        main,
        [
            "generate",
            "-m",
            str(base),
            "-a",
            str(tmp_path / "out"),
            "-p",
            "The sky",
            "-n",
            "8",
            "--layout",
            "linear",
            "--json",
        ],
    )
    assert text.exit_code == 0 and json.loads(text.stdout)["lossless"] is True
    for arguments, message in (
        ((), "give --heads-only, and the model's folder with --base"),
        (("--heads-only",), "give the model's folder with --base"),
        (("--heads-only", "--base", base, "--verify"), "no MTP heads: leave --verify"),
        (("--heads-only", "--base", base, "--heads-as", "speculators"), "no MTP heads"),
        (("--heads-only", "--base", tmp_path / "nowhere"), "nowhere"),
    ):
        refused = command(source, tmp_path / "new", *arguments)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()), arguments
        assert not (tmp_path / "new").exists()
