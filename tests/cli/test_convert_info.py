"""`mtp-mlx info` on checkpoints, and on what `convert` makes of them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.convert_runs import medusa, refused, run
from tests.convert.gguf.gguf_files import write_model
from tests.convert.heads.head_checkpoints import make
from tests.convert.read.torch_files import write_torch
from tests.convert.whole_checkpoints import whole


def test_info_of_a_gguf_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf").path
    facts = json.loads(run("info", path, "--json").stdout)
    assert (facts["container"], facts["type"], facts["size"]) == ("gguf", "llama", path.stat().st_size)
    assert "none are read" in facts["mtp heads"]
    assert f"give one of the .gguf files in it, such as {path}" in refused(
        "convert", tmp_path, tmp_path / "out"
    )


def test_info_of_checkpoints_and_heads(tmp_path: Path) -> None:
    source = make("mimo-7b").write(tmp_path / "model")
    facts = json.loads(run("info", source, "--json").stdout)
    assert facts["kind"] == "model" and facts["mtp heads"]["family"] == "MiMo-7B"
    facts = json.loads(run("info", source / "model.safetensors", "--json").stdout)
    assert facts["kind"] == "checkpoint" and facts["mtp heads"]["count"] == 1
    run("convert", source, tmp_path / "heads", "--heads-only")
    facts = json.loads(run("info", tmp_path / "heads", "--json").stdout)
    assert (facts["kind"], facts["method"], facts["heads"]) == ("adapter", "mtp-heads", 1)
    assert facts["convention"]["stored order"] == "hidden"
    text = run("info", tmp_path / "heads").stdout
    assert "method: mtp-heads" in text and "  first hidden: pre-norm" in text
    whole("mimo-7b").write(source)
    assert run("convert", source, tmp_path / "out").exit_code == 0
    facts = json.loads(run("info", tmp_path / "out", "--json").stdout)
    assert facts["kind"] == "model" and facts["usable"] == "yes"
    assert facts["adapter beside it"]["family"] == "MiMo-7B"
    assert facts["adapter beside it"]["base"]["fingerprint"] == facts["fingerprint"]
    (tmp_path / "heads" / "mtp_config.json").write_text('{"method": "mtp-heads"}')
    assert "mtp_config.json is damaged" in refused("info", tmp_path / "heads")


def test_info_of_pytorch_files(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "medusa" / "medusa_lm_head.pt", medusa(tmp_path / "medusa"))
    for where in (path, path.parent):
        facts = json.loads(run("info", where, "--json").stdout)
        assert (facts["container"], facts["mtp heads"]["family"]) == ("pytorch", "Medusa")
