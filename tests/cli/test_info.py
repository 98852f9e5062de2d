"""`mtp-mlx info` on this machine, tiny models and adapters; nothing needs the adapter's base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mlx_lm.models.cache import ChunkedKVCache, KVCache

import mtp_mlx.cli as cli
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import random_adapter
from tests.tiny import save_tiny, tiny_model

ADAPTERS = Path(__file__).parent.parent / "adapters"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))


def run(*args: Any) -> Result:
    return CliRunner().invoke(cli.main, ["info", *map(str, args)])


def facts(*args: Any) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_machine(tmp_path: Path) -> None:
    found = facts()
    assert found["kind"] == "machine" and {"mtp-mlx", "mlx", "mlx-lm", "python"} <= found["versions"].keys()
    assert found["cache"] == {"folder": str(tmp_path / "cache"), "size": 0}
    assert "not yet" in found["embedded models"]["smollm2-135m"]["converted"]
    model = tmp_path / "cache" / "models" / "smollm2-135m-float32-v1"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert facts()["embedded models"]["smollm2-135m"]["converted"] == [model.name]
    text = run().stdout
    assert "versions:\n  mtp-mlx: " in text and "size: 2 B" in text


def test_model(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", "qwen3", seed=3)
    found = facts(path)
    assert found["kind"] == "model" and found["type"] == "qwen3" and found["usable"] == "yes"
    assert found["seams"] == {"embed_tokens": 1, "linear": 14, "rope": 2, "cache": "KVCache"}
    assert found["fingerprint"] == base_fingerprint(tiny_model("qwen3", seed=3))
    assert found["draft trees"] == "yes"
    assert found["size"] == sum(file.stat().st_size for file in path.iterdir())
    assert "usable: yes" in run(path).stdout


def test_models_with_windows_and_states(tmp_path: Path) -> None:
    window = facts(save_tiny(tmp_path / "window", "gemma3_text", seed=3))
    assert window["usable"] == "yes" and window["seams"]["cache"] == "KVCache, RotatingKVCache"
    states = facts(save_tiny(tmp_path / "states", "qwen3_next", seed=3))
    assert states["usable"] == "yes, with slots in the linear layout only"
    assert states["draft trees"] == "no: this model's recurrent state reads every row of a pass"
    assert states["seams"]["cache"] == "ArraysCache, KVCache"


def test_model_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(
        "mlx_lm.models.llama.Model.make_cache", lambda self: [KVCache(), ChunkedKVCache(8)], raising=False
    )
    assert "no seam 'cache' in layer 1: its ChunkedKVCache" in facts(path)["usable"]


def test_model_that_mlx_lm_cannot_load(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text('{"model_type": "unheard_of"}')
    assert "unheard_of" in facts(path)["usable"]
    (path / "config.json").write_text(config)
    settings = {"num_attention_heads": 0, "head_dim": None}
    (path / "config.json").write_text(json.dumps(json.loads(config) | settings))
    assert '"num_attention_heads" is 0' in facts(path)["usable"]
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(b"broken")
    assert facts(path)["usable"].startswith("no: model.safetensors is cut off or damaged")


def test_adapter(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=3)
    adapter = random_adapter(model)
    info = mask_header(
        adapter.config,
        "tiny",
        base_fingerprint(model),
        training={"steps": 7},
        acceptance=[0.5, 0.25],
        measurements={"dev": {"n": 1}},
    )
    save_adapter(tmp_path / "adapter", adapter, info)
    found = facts(tmp_path / "adapter")
    assert found["kind"] == "adapter" and found["base"]["fingerprint"] == base_fingerprint(model)
    assert (
        found["shape"]["slots"] == 4
        and found["acceptance"] == [0.5, 0.25]
        and found["training"] == {"steps": 7}
    )
    assert found["weights"] == sum(tensor.size for tensor in adapter.tensors().values())
    shown = run(tmp_path / "adapter").stdout
    assert "acceptance: 0.50 / 0.25" in shown and "  target_modules: every linear layer" in shown
    (tmp_path / "adapter" / "mtp.safetensors").write_bytes(b"x")
    assert "missing or damaged" in run(tmp_path / "adapter").stderr


def test_an_adapter_says_what_its_method_and_its_source_are(tmp_path: Path) -> None:
    folder = shutil.copytree(ADAPTERS / "medusa", tmp_path / "heads")
    config = json.loads((folder / "mtp_config.json").read_text())
    config["source"]["dropped"] = [{"tensor": "a.weight", "same_as": "b.weight"}]
    (folder / "mtp_config.json").write_text(json.dumps(config))
    found, shown = facts(folder), run(folder).stdout
    assert (found["family"], found["heads"], found["convention"]["kind"]) == ("Medusa", 3, "medusa")
    assert "  dropped: tensor a.weight, same as b.weight\n" in shown and "acceptance: not measured" in shown
    (folder / "mtp_config.json").write_text(json.dumps({**config, "method": "hydra"}))
    assert "has the method 'hydra', which this version of mtp-mlx does not know; it knows 'mask-tokens'" in (
        run(folder).stderr
    )


@pytest.mark.parametrize("kind", ["missing", "empty", "config"])
def test_errors(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind != "missing":
        path.mkdir()
    if kind == "config":
        (path / "config.json").write_text("[")
    result = run(path)
    message = {"missing": "does not exist", "empty": "neither a model folder", "config": "is not JSON"}[kind]
    assert result.exit_code == 2 and message in result.stderr
