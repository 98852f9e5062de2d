"""`mtp-mlx convert --dry-run`: what the plan says of every kind of source, and that making it needs no mlx."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.cli.convert_runs import medusa, refused, run
from tests.convert.adapters.test_peft import SLOTS, factors
from tests.convert.adapters.test_peft import folder as peft_folder
from tests.convert.adapters.test_ptp import lightning, new_knots
from tests.convert.gguf.gguf_files import write_model
from tests.convert.heads.head_checkpoints import make
from tests.convert.read.torch_files import write_torch
from tests.convert.whole_checkpoints import whole
from tests.tiny import save_tiny


def test_the_plan(tmp_path: Path) -> None:
    source = make("deepseek-v3").write(tmp_path / "model")
    result = run("convert", source, "--dry-run")
    assert result.exit_code == 0, result.output
    for line in (
        "family: DeepSeek-V3 / R1",
        "heads: 1",
        "  first hidden: post-norm",
        "block: mlx_lm.models.deepseek_v3.DeepseekV3DecoderLayer",
        "  heads.0.fuse.weight [48, 96] F32 <- model.layers.4.eh_proj.weight",
        "model.layers.4.mlp.experts.0.up_proj.weight .. model.layers.4.mlp.experts.2.up_proj.weight (3), stacked",
        "  model.layers.4.shared_head.head.weight = lm_head.weight",
    ):
        assert line in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    mimo = run("convert", make("mimo-7b").write(tmp_path / "mimo"), "--dry-run").stdout
    assert "model.mtp_layers.0.input_proj.weight, columns swapped to [embedding ; hidden]" in mimo


NO_MLX = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlx", "mlx_lm", "transformers", "torch"):
            raise ImportError(f"{name} must not be imported")
sys.meta_path.insert(0, Refuse())
TOLD = ("family", "architecture", "heads", "student")
from click.testing import CliRunner
import mtp_mlx.cli as cli
for source in sys.argv[1:]:
    result = CliRunner().invoke(cli.main, ["convert", source, "--dry-run"])
    assert result.exit_code == 0, result.output
    print([line for line in result.stdout.splitlines() if line.startswith(TOLD)])
"""


def test_the_plan_needs_no_mlx(tmp_path: Path) -> None:
    """Where importing mlx fails, plans of all kinds of sources are made."""
    sources = [
        make(name).write(tmp_path / name) for name in ("qwen3-next experts", "deepseek-v3", "nemotron-h")
    ]
    torch_file = tmp_path / "medusa" / "medusa_lm_head.pt"
    sources += [write_torch(torch_file, medusa(tmp_path / "medusa")).parent, torch_file]
    sources += [peft_folder(tmp_path / "lora", factors() | SLOTS), write_model(tmp_path / "m.gguf").path]
    sources.append(lightning(tmp_path, new_knots()))  # a student of Parallel Token Prediction
    arguments = [sys.executable, "-c", NO_MLX, *map(str, sources)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    titles = ("Qwen3-Next", "DeepSeek-V3", "Nemotron-H", "Medusa", "Medusa", "PEFT", "llama", "student")
    for line, title in zip(lines, titles, strict=True):
        assert title in line


def test_the_plan_of_a_folder_that_was_converted_before(tmp_path: Path) -> None:
    """Its config.json still announces heads, which lie beside the trunk by now."""
    source = whole("mimo-7b").write(tmp_path / "model")
    assert run("convert", source, tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    plan = run("convert", tmp_path / "out", "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert f"heads: converted before, in {tmp_path / 'out' / 'mtp'}" in plan.stdout


def test_the_plan_of_what_has_no_heads(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    assert "heads: none" in run("convert", model, "--dry-run").stdout
    assert "holds no MTP heads of a known kind" in refused("convert", model, "--dry-run", "--heads-only")
    gguf = write_model(tmp_path / "m.gguf").path
    plan = run("convert", gguf, tmp_path / "out", "--dry-run")
    assert plan.exit_code == 0 and "architecture: llama" in plan.stdout and not (tmp_path / "out").exists()
    assert "not read from .gguf" in refused("convert", gguf, tmp_path / "out", "--heads-only")
