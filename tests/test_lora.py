"""A model with a fine-tune of mlx-lm writes mlx-lm's text with it, whatever drafts; other folders are refused."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mtp_mlx import load, lora
from mtp_mlx.cli.eval import EvalSettings, _load
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import ChainPolicy, FixedPolicy
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.seams import find_seams, updated_layers
from mtp_mlx.planning.calibrate import cost_key
from tests.decode.fakes import random_adapter
from tests.drafters.heads.test_loop import random_heads
from tests.tiny import save_tiny, tiny_model

PROMPT = [3, 4, 5, 6, 3, 4, 5]
SETTINGS = {"rank": 4, "scale": 10.0, "dropout": 0.0}


def base(bits: int | None = None) -> nn.Module:
    model = tiny_model("llama", seed=3, hidden_size=64, intermediate_size=96)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    return model


def fine_tune(folder: Path, model: nn.Module, kind: str = "lora") -> Path:
    """A folder as mlx_lm.lora writes it, of random updates of `model`, which is wrapped."""
    linear_to_lora_layers(model, 2, SETTINGS, use_dora=kind == "dora")
    mx.random.seed(1)
    names = {"lora_a", "lora_b"}
    weights = {
        name: 0.3 * mx.random.normal(value.shape)
        for name, value in tree_flatten(model.parameters())
        if name.rsplit(".", 1)[-1] in names
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"num_layers": 2, "lora_parameters": SETTINGS, "fine_tune_type": kind}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def text_of_mlx_lm(model: nn.Module) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=30)]


@pytest.mark.parametrize("drafter", ["slots", "heads"])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_text_is_mlx_lms_with_the_fine_tune(
    kind: str, bits: int | None, drafter: str, tmp_path: Path
) -> None:
    folder, plain = fine_tune(tmp_path / "tune", base(bits), kind), base(bits)
    before = text_of_mlx_lm(plain)
    expected = text_of_mlx_lm(load_adapters(plain, str(folder)))
    model = base(bits)
    source = random_adapter(model) if drafter == "slots" else random_heads(model, 2)
    assert lora.put_on(model, folder).startswith(f"the fine-tune {folder} ({kind}) is on the model")
    attached = attach(model, source)
    policy = FixedPolicy("quadratic", 2) if drafter == "slots" else ChainPolicy(2)
    found = [item.token for item in mtp_generate_step(PROMPT, attached, max_tokens=30, policy=policy)]
    assert found == expected != before
    attached.detach()
    assert text_of_mlx_lm(model) == expected


def test_costs_are_not_those_of_the_base(tmp_path: Path) -> None:
    """A wrapped layer makes steps slower: what was measured or tuned without the fine-tune is not taken for it."""
    tuned = base()
    lora.put_on(tuned, fine_tune(tmp_path / "tune", base()))
    assert find_seams(tuned).linears.keys() == find_seams(base()).linears.keys()
    before, after = cost_key(attach(base())), cost_key(attach(tuned))
    size = sum(value.size for name, value in tree_flatten(tuned.parameters()) if "lora_" in name)
    assert "fine-tune" not in before and after == {**before, "fine-tune": f"14 layers, {size} weights"}


def test_eval_reads_it_too(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", "llama", seed=3)
    tune = fine_tune(tmp_path / "tune", tiny_model("llama", seed=3))
    settings = EvalSettings(model=str(path), adapter="none", adapter_path=str(tune))
    model, _ = _load(settings)
    assert updated_layers(model.model)


def test_load_puts_it_on_behind_the_check_of_the_adapter(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", "llama", seed=3)
    tune = fine_tune(tmp_path / "tune", tiny_model("llama", seed=3))
    model, _ = load(str(path), None, adapter_path=tune)
    reference = load_adapters(tiny_model("llama", seed=3), str(tune))
    found = [item.token for item in mtp_generate_step(PROMPT, model, max_tokens=20)]
    assert found == text_of_mlx_lm(reference)[:20]


def test_what_is_no_fine_tune_of_this_model_is_refused(tmp_path: Path) -> None:
    tune = fine_tune(tmp_path / "tune", base())
    with pytest.raises(MTPError, match="does not fit this model .*with the model that it was trained on"):
        lora.put_on(tiny_model("llama", seed=3), tune)
    with pytest.raises(MTPError, match="`adapter_path` must be a folder that mlx_lm.lora wrote"):
        lora.put_on(base(), tmp_path / "missing")
    (tune / "adapters.safetensors").write_bytes(b"no tensors")
    with pytest.raises(MTPError, match="adapters.safetensors: cannot be read"):
        lora.put_on(base(), tune)
    (tune / "adapter_config.json").write_text("{")
    with pytest.raises(MTPError, match="adapter_config.json is damaged"):
        lora.put_on(base(), tune)
    (tune / "mtp_config.json").write_text("{}")
    with pytest.raises(MTPError, match="is an adapter of mtp-mlx"):
        lora.put_on(base(), tune)
