"""Proves that texts need no cache: with an empty one, or where nothing can be kept, on dense and quantised models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from click.testing import CliRunner, Result
from mlx.utils import tree_flatten

import mtp_mlx.cli as cli
from mtp_mlx import files
from mtp_mlx.cli.serve import ServeSettings, application
from mtp_mlx.drafters.heads import folder as heads_folder
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.folder import LAST_LAYER, HeadsConfig, heads_header
from mtp_mlx.drafters.masks import folder as mask_folder
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.ptp import folder as ptp_folder
from mtp_mlx.drafters.ptp.folder import ptp_header
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.planning import calibrate
from tests.cache_states import STATES
from tests.decode.fakes import random_adapter
from tests.drafters.heads.test_mtp_head import random_heads
from tests.drafters.ptp.ptp_fakes import random_ptp_adapter
from tests.model.naive import QUANTIZABLE
from tests.tiny import never_end, save_tiny

COUNT = 24
BASES = ["dense", "quantised"]
DRAFTERS = ["none", "masks", "ptp", "heads", "draft-model"]
LAYOUTS = ["auto", "linear", "quadratic", "plain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, dense and at 4 bits, and random drafters for each of the two."""
    root = tmp_path_factory.mktemp("cold")
    for base in BASES:
        save_tiny(root / base, "qwen3", seed=3, **QUANTIZABLE)
        never_end(root / base)
    model: Any = mlx_lm.load(str(root / "quantised"))[0]
    nn.quantize(model, group_size=32, bits=4)
    weights = dict(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())))
    mx.save_safetensors(str(root / "quantised" / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = json.loads((root / "quantised" / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (root / "quantised" / "config.json").write_text(json.dumps(config))
    save_tiny(root / "draft-model", "qwen3", seed=3, **QUANTIZABLE, num_hidden_layers=1)
    never_end(root / "draft-model")
    for base in BASES:
        _save_drafters(root, base)
    return root


def _save_drafters(root: Path, base: str) -> None:
    model: Any = mlx_lm.load(str(root / base))[0]
    known = base_fingerprint(model)
    masks, ptp = random_adapter(model), random_ptp_adapter(model)
    mask_folder.save(root / f"{base}-masks", masks, mask_header(masks.config, "tiny", known))
    ptp_folder.save(root / f"{base}-ptp", ptp, ptp_header(ptp.config, "tiny", known))
    dense: Any = mlx_lm.load(str(root / "dense"))[0]
    convention = HeadConvention("test")
    heads = random_heads(dense, 2, convention).heads
    config = HeadsConfig(convention, [dict(LAST_LAYER)] * 2)
    heads_folder.save(
        root / f"{base}-heads", MTPHeads(heads, convention), heads_header(config, "tiny", known)
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_warned", {})
    monkeypatch.setattr(calibrate, "_measured", {})
    return tmp_path / "cache"


def run(verb: str, folder: Path, base: str, drafter: str, *more: str, stdin: str | None = None) -> Result:
    drafting = {"none": [], "draft-model": ["--draft-model", str(folder / "draft-model")]}
    given = drafting.get(drafter, ["-a", str(folder / f"{base}-{drafter}")])
    return CliRunner().invoke(cli.main, [verb, "-m", str(folder / base), *given, *more], input=stdin)


def generate(folder: Path, base: str, drafter: str, *more: str) -> Any:
    result = run("generate", folder, base, drafter, "-p", "The sky", "-n", str(COUNT), "--json", *more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("base", BASES)
def test_generate_with_a_cold_and_a_warm_cache(folder: Path, cache: Path, base: str, drafter: str) -> None:
    """In every layout that the drafter has; the others are one sentence."""
    expected = generate(folder, base, "none", "--layout", "plain")["tokens"]
    assert len(expected) == COUNT
    for layout in LAYOUTS:
        if (layout == "quadratic" and drafter not in ("masks", "ptp")) or (
            layout == "linear" and drafter == "none"
        ):
            result = run("generate", folder, base, drafter, "-p", "x", "--layout", layout)
            assert result.exit_code == 2 and result.stderr.startswith("Error: layout"), result.output
            continue
        for _ in range(2):
            assert generate(folder, base, drafter, "--layout", layout)["tokens"] == expected
    assert len(list((cache / "costs").iterdir())) == 1


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("drafter", ["masks", "heads"])
def test_nothing_needs_a_cache_that_can_be_written(
    folder: Path, cache: Path, drafter: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every verb goes on without, on a quantised model, and says once of each kind of thing that it is not kept."""
    STATES[state](monkeypatch, cache)
    prompts = str(_prompts(cache.parent))
    few = ["-p", prompts, "-n", "8"]
    for verb, more, stdin in [
        ("generate", ["-p", "The sky", "-n", "20"], None),
        ("generate", ["-p", "The sky", "-n", "40", "--layout", "plain"], None),
        ("chat", ["-n", "20"], "The sky\n"),
        ("bench", few, None),
        ("tune", few, None),
        ("eval", ["-q", prompts, "-n", "8"], None),
    ]:
        result = run(verb, folder, "quantised", drafter, *more, stdin=stdin)
        assert result.exit_code == 0 and "Traceback" not in result.output, (verb, result.output)
    assert application(
        ServeSettings(model=str(folder / "quantised"), adapter=str(folder / f"quantised-{drafter}")), None
    )
    assert sorted(files._warned) == ["plain speeds", "step costs", "tuned layouts"]


def _prompts(folder: Path) -> Path:
    """A file of one prompt."""
    path = folder / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "The sky", "category": "a"}) + "\n")
    return path
