"""Proves that the notebook runs from top to bottom, that its drawings and counts are right, and that it is clean."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import random_adapter
from tests.tiny import save_tiny, tiny_model

NOTEBOOK = Path(__file__).parents[2] / "examples" / "what_a_step_does.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_runs_in_reduced_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    model = save_tiny(tmp_path / "model", seed=3)
    base = tiny_model(seed=3)
    adapter = random_adapter(base)
    info = mask_header(adapter.config, "tiny", base_fingerprint(base))
    save_adapter(tmp_path / "adapter", adapter, info)
    names: dict[str, Any] = {}
    settings, *rest = code_cells()
    assert 'MODEL, ADAPTER = "smollm2-135m", "auto"' in settings
    exec(settings, names)
    names.update(MODEL=str(model), ADAPTER=str(tmp_path / "adapter"), TOKENS=18)
    for number, cell in enumerate(rest):
        exec(compile(cell, f"cell {number + 2}", "exec"), names)
    said = capsys.readouterr().out
    assert "18 tokens in " in said and said.rstrip().endswith("the same")
    steps = names["watching"].steps
    trees = names["trees"].steps
    assert sum(1 + step.accepted for step in steps) >= 18 <= sum(1 + len(step.accepted) for step in trees)
    assert any(step.layout.parents for step in trees)
    drawings = [*names["drawings"], *names["pictures"](trees, names["tree_tokens"])]
    for drawing, (_, layout, accepted) in zip(drawings, [*steps, *trees], strict=True):
        labels = [
            text.text or ""
            for text in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")
        ]
        assert len(labels) == layout.rows
        rows = range(1, 1 + accepted) if isinstance(accepted, int) else accepted
        assert [row for row, label in enumerate(labels) if ", accepted" in label] == list(rows)
    assert names["right"] == [sum(step[2] > depth for step in steps) for depth in range(3)]


def test_it_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
