"""The benchmarks that no other test runs still run, on a tiny model."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path
from typing import Any

import ablation
import first_answer
import heads_acceptance
import lora_same_text
import memory_acceptance
import mlx.core as mx
import mlx.nn as nn
import pytest
import same_text
import serving
import slots_acceptance
import train_memory
from click.testing import CliRunner
from model_shapes import config_of, weightless

import mtp_mlx.cli as cli
from mtp_mlx import load
from mtp_mlx.cli.train_options import settings_from
from mtp_mlx.decode.tree import ROOT, DraftTree
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.folder import LAST_LAYER, HeadsConfig, heads_header
from mtp_mlx.drafters.heads.folder import save as save_heads
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.drafters.registry import method_class
from mtp_mlx.drafters.slots.agreement import measure_agreement
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.train.data import load_examples
from mtp_mlx.train.memory import MemoryBudget, parameter_bytes
from tests.decode.fakes import random_adapter
from tests.drafters.heads.test_mtp_head import random_heads
from tests.model.naive import random_adapter as random_drafting_adapter
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, with an adapter of slots and one of heads."""
    root = tmp_path_factory.mktemp("benchmarks")
    save_tiny(root / "model", "llama", seed=3)
    model = tiny_model("llama", seed=3)
    base, adapter, convention = base_fingerprint(model), random_adapter(model), HeadConvention("test")
    save_adapter(root / "adapter", adapter, mask_header(adapter.config, "tiny", base))
    heads = MTPHeads(random_heads(model, 2, convention).heads, convention)
    save_heads(
        root / "heads", heads, heads_header(HeadsConfig(convention, [dict(LAST_LAYER)] * 2), "tiny", base)
    )
    rows = [{"prompt": f"add {i}", "completion": f"The sum is {i}."} for i in range(3)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(autouse=True)
def in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    for module in (same_text, heads_acceptance, lora_same_text, slots_acceptance):
        monkeypatch.setattr(module, "prefer_openblas", lambda: None)


def test_same_text(folder: Path) -> None:
    options = ["--model", str(folder / "model"), "--adapter", str(folder / "adapter")]
    result = CliRunner().invoke(same_text.main, [*options, "--limit", "2", "--max-tokens", "8"])
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout[result.stdout.index("{\n") :])
    lanes = {name: count for name, count in counts.items() if name.startswith("temperature")}
    assert len(lanes) == 7 and set(lanes.values()) == {2} and not any("DIFFERENT" in name for name in lanes)


@pytest.mark.parametrize(("rate", "code"), [(0.02, 0), (1e-12, 1)], ids=["learns", "learns nothing"])
def test_lora_same_text(folder: Path, rate: float, code: int) -> None:
    options = ["--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--json"]
    sizes = ["--limit", "2", "--max-tokens", "8", "--steps", "3", "--learning-rate", str(rate)]
    result = CliRunner().invoke(lora_same_text.main, [*options, *sizes], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert result.exit_code == code and (found["changed by the fine-tune"] > 0) == (code == 0), found
    assert [(row["layout"], row["same"]) for row in found["rows"]] == [
        (layout, 2) for layout in lora_same_text.LAYOUTS
    ]


def test_serving(folder: Path) -> None:
    options = ["--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--clients", "2"]
    layouts = ["--layout", "plain", "--layout", "linear", "--drafts", "2"]
    result = CliRunner().invoke(serving.main, [*options, *layouts, "--max-tokens", "6"])
    assert result.exit_code == 0, result.output
    rows = [line.split("|")[1:3] for line in result.stdout.splitlines()[2:]]
    assert [(layout.strip(), way.strip()) for layout, way in rows] == [
        (layout, way) for layout in ("plain", "linear") for way in serving.WAYS
    ]


def test_heads_acceptance(folder: Path) -> None:
    entries = ["--heads", str(folder / "heads"), "--heads", f"{folder / 'heads'}:4", "--json"]
    result = CliRunner().invoke(
        heads_acceptance.main,
        ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), *entries],
    )
    assert result.exit_code == 0, result.output
    assert [len(row["ar"]) for row in json.loads(result.stdout)] == [2, 4]


@pytest.mark.parametrize("script", ablation.MEASURES.values())
def test_what_an_ablation_asks_of_the_benchmarks(script: str) -> None:
    """All cases are measured with the same words, whatever the method."""
    command = {"heads_acceptance.py": heads_acceptance.main, "slots_acceptance.py": slots_acceptance.main}[
        script
    ]
    asked = {option for parameter in command.params for option in parameter.opts}
    assert {"--data", "--json", "--limit", ablation.FOLDER_OPTIONS[script]} <= asked


def test_an_ablation_keeps_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose steps had more rows than those of the probe is made again; a finished one is not."""
    trained = []

    def train(method: str, settings: dict[str, Any], data: Path, out: Path) -> None:
        trained.append((out.name, settings["steps"]))
        rows = 10 if out.name.endswith("probe") else 15
        lines = [json.dumps({"rows": rows})] * settings["steps"]
        out.with_name(f"{out.name}.metrics.jsonl").write_text("\n".join(lines))
        out.mkdir()
        (out / "mtp_config.json").write_text("{}")

    monkeypatch.setattr(ablation, "train", train)
    plan = ablation.Plan("mask-tokens", 600, {}, {"one part": {}})
    for _ in range(2):
        out = ablation.run(plan, "one part", 0, {}, Path("data.jsonl"), tmp_path)
        assert out.name == "one-part-0.2" and ablation.rows_of(out) == 600
    assert trained == [("one-part-0.probe", 8), ("one-part-0", 60), ("one-part-0.2", 40)]


def test_slots_acceptance(folder: Path) -> None:
    """With two adapters, whose shared first pass changes nothing: each has what training measures of it alone."""
    rows = [{"prompt": f"fox {n}", "completion": "the fox the dog " * 5} for n in range(3)]
    (folder / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, tokenizer = load(str(folder / "model"), None)
    examples, _ = load_examples(folder / "same.jsonl", tokenizer, 1024)
    used = Counter(token for example in examples for token in example.tokens[example.loss_start :])
    few_ids = mx.array(
        sorted(token for token, _ in used.most_common(4)), dtype=mx.int32
    )  # some drafts are right
    for name, slots in (("two", 2), ("three", 3)):
        model = tiny_model("llama", seed=3)
        adapter = random_drafting_adapter(model, slots=slots, draft_ids=few_ids)
        save_adapter(folder / name, adapter, mask_header(adapter.config, "tiny", base_fingerprint(model)))
    entries = [part for name in ("two", "three") for part in ("--adapter", str(folder / name))]
    options = ["--model", str(folder / "model"), "--data", str(folder / "same.jsonl"), *entries]
    result = CliRunner().invoke(slots_acceptance.main, [*options, "--json"])
    assert result.exit_code == 0, result.output
    for name, row in zip(("two", "three"), json.loads(result.stdout), strict=True):
        attached, _ = load(str(folder / "model"), folder / name)
        alone = measure_agreement(attached, [[one] for one in examples], attached.most_drafts, most=1000)
        assert row["positions"] == alone.blocks > 20 and 0 < row["ar"][0] < 1
        assert row["ar"] == alone.acceptance and row["tokens_per_step"] == alone.tokens_per_step
    few = CliRunner().invoke(slots_acceptance.main, [*options, "--every", "3", "--limit", "2"])
    assert few.exit_code == 0 and few.stdout.count("| CAR |") == 2 and "of 2 rows" in few.stdout


def test_train_memory_counts_what_a_real_model_has(tmp_path: Path) -> None:
    """A model without weights has the sizes of the quantised model, and the trainer's own estimate."""
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    folder = save_tiny(tmp_path / "model", "llama", seed=3, **sizes)
    model = tiny_model("llama", seed=3, **sizes)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 32, 4)
    config = config_of(str(folder)) | {"quantization": {"group_size": 32, "bits": 4}}
    empty = weightless(config, 16)
    assert parameter_bytes(empty) == parameter_bytes(model)
    rows = train_memory.rows_of(157)
    for _, name, path, options in train_memory.CASES:
        found = train_memory.run_of(empty, name, path, options, rows, MemoryBudget(10**12, "`memory` allows"))
        method = method_class(name)
        settings = settings_from(path, {"data": Path("d"), "out": tmp_path / "a", **options}, name)
        real = method(model, rows, method.settled(settings, rows), lambda message: None)
        estimate = real.estimate_memory(rows, found.plan)
        real.attached.detach()
        assert found.memory - estimate.total + estimate.process == pytest.approx(train_memory.PROCESS, abs=1)
        assert found.least <= found.memory


def test_train_memory_counts_flop() -> None:
    """Of smollm2-135m, by hand: a slot row takes 425 MFLOP in the trunk, 16 in LoRA and 75 in its heads."""
    shape = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
    }
    trunk = train_memory.Trunk.of(weightless(shape, 16))
    assert 2 * trunk.forward(0) == pytest.approx(425e6, rel=0.01)
    assert (trunk.attention, trunk.layers) == (576, 30) and trunk.lm_head == 2 * 576 * 49152


def test_train_memory_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    train_memory.main(["--model", "qwen2.5-0.5b", "--memory", "1GB"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| qwen")]
    assert len(lines) == len(train_memory.CASES) + 1
    assert [("does not fit" in line) for line in lines] == [False, True, True, False, True, False]
    train_memory.main(["--model", "qwen2.5-0.5b", "--tflops", "3"])
    assert "3 TFLOP/s |" in capsys.readouterr().out


def test_first_answer(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    options = ["--model", str(model), "--quantize", "0", "--prompt-tokens", "9", "--max-tokens", "20"]
    result = CliRunner().invoke(first_answer.main, options)
    assert result.exit_code == 0, result.output
    cells = result.stdout.splitlines()[2].strip("| ").split(" | ")
    assert cells[:2] == ["none", "9"] and all(0 <= float(cell) < 60 for cell in cells[2:5])


def test_memory_acceptance(folder: Path, tmp_path: Path) -> None:
    """A memory of the answers themselves drafts them; trees are never worse than chains of as many drafts."""
    data, memory = str(folder / "data.jsonl"), str(tmp_path / "a.mem")
    made = CliRunner().invoke(cli.main, ["remember", "-m", str(folder / "model"), data, "--out", memory])
    assert made.exit_code == 0, made.output
    common = [
        "--model",
        str(folder / "model"),
        "--data",
        data,
        "--memory",
        memory,
        "--rows",
        "2",
        "--rows",
        "8",
    ]
    result = CliRunner().invoke(memory_acceptance.main, [*common, "--json"])
    assert result.exit_code == 0, result.output
    found = {(row["drafter"], row["rows"]): row for row in json.loads(result.stdout)}
    rates = {key: row["tokens_per_step"]["all"] for key, row in found.items()}
    assert rates["memory, chain", 8] > 2 and rates["lookup", 8] < rates["both, tree", 8]
    for name in ("running text", "memory", "both"):
        assert rates[f"{name}, tree", 8] >= rates[f"{name}, chain", 8] >= rates[f"{name}, chain", 2] >= 1
    assert all(row["drafts_per_step"] <= row["rows"] - 1 for row in found.values())
    table = CliRunner().invoke(memory_acceptance.main, common).stdout
    assert f"| both, tree | 8 | {found['both, tree', 8]['drafts_per_step']:.1f} |" in table


def test_the_path_through_a_tree() -> None:
    tree = DraftTree((5, 6, 7, 8), (ROOT, ROOT, 1, 2), (0.5,) * 4)
    accepted = memory_acceptance.accepted
    assert [accepted(tree, truth) for truth in ([6, 7, 8, 9], [5, 7], [6, 8], [9], [])] == [3, 1, 1, 0, 0]


FAST = [
    path
    for path in sorted(Path(ablation.__file__).parent.glob("*.py"))
    if "prefer_openblas" in path.read_text()
]


@pytest.mark.parametrize("path", FAST, ids=lambda path: path.stem)
def test_openblas_is_loaded_before_mlx(path: Path) -> None:
    """Behind it, it has no effect, and what is timed is many times slower."""
    light = ("mtp_mlx.blas", "mtp_mlx.config", "mtp_mlx.errors")
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Expr) and ast.unparse(statement) == "prefer_openblas()":
            return
        names = [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
        names += [name.name for name in statement.names] if isinstance(statement, ast.Import) else []
        assert not [
            name for name in names if name.split(".")[0].startswith(("mlx", "mtp_mlx")) and name not in light
        ]


def test_the_benchmarks_that_time_a_model_load_openblas() -> None:
    assert {"first_answer", "serving", "same_text_search"} <= {path.stem for path in FAST}
