"""Proves that a hub id is downloaded once, PyTorch files only where needed, and that paths are left alone."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from mtp_mlx.convert.read.checkpoint import is_hub_id, local_source
from mtp_mlx.errors import MTPError


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is asked of a hub that has one repository, "owner/model", whose files lie in `tmp_path / "hub"`."""
    asked: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if name != "owner/model":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such\nrepository")
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_safetensors_are_enough(tmp_path: Path, calls: list[list[str]]) -> None:
    (tmp_path / "hub" / "model.safetensors").write_bytes(b"")
    assert local_source("owner/model") == tmp_path / "hub"
    assert len(calls) == 1 and "*.safetensors" in calls[0] and "*.bin" not in calls[0]


def test_pytorch_files_where_there_is_nothing_else(tmp_path: Path, calls: list[list[str]]) -> None:
    assert local_source("owner/model") == tmp_path / "hub"
    assert len(calls) == 2 and {"*.bin", "*.pt", "*.pth", "*.ckpt", "*.json"} <= set(calls[1])


def test_what_cannot_be_had_is_one_sentence(calls: list[list[str]]) -> None:
    with pytest.raises(MTPError, match="owner/other: not a file or folder here.*no such repository"):
        local_source("owner/other")


def test_paths_are_no_hub_ids(tmp_path: Path, calls: list[list[str]]) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    for source in ("owner/model", "./owner/other", "/owner/other", "model", "a/b/c", "../x/y", "~/m"):
        assert not is_hub_id(source)
        local_source(source)
    assert calls == []
