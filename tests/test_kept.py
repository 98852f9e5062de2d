"""Proves that what cannot be kept for convenience stops nothing: each kind is warned of once, and nothing is left."""

from __future__ import annotations

import errno
import logging
import os
import readline
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mtp_mlx import files
from mtp_mlx.cli import chat, main
from mtp_mlx.measure import plain_speed
from mtp_mlx.metal_kernels import dispatch
from mtp_mlx.metal_kernels.verdicts import Verdict
from mtp_mlx.planning import calibrate, tuned
from tests.cache_states import STATES
from tests.decode.fakes import attached


def keep_costs() -> None:
    model = attached("llama")
    cost = calibrate.step_cost(model, lambda _: None)
    assert calibrate.step_cost(model, lambda _: pytest.fail("measured twice")) == cost


def keep_layout() -> None:
    model = attached("llama")
    assert tuned.remember(model, tuned.TunedChoice("plain", "plain", None, None, 1.0, 1.0), {}) is None
    assert tuned.recall(model) is None and tuned.forget(model) is False


def keep_speed() -> None:
    assert plain_speed.remember("a/b", 11.0, 40) is False
    assert plain_speed.recall("a/b") is None


def keep_verdict() -> None:
    with pytest.MonkeyPatch.context() as patch:  # as where a kernel can run
        patch.setattr(dispatch, "find_factory", lambda _: (print, "test"))
        patch.setattr(dispatch, "mode_from_environment", lambda: "auto")
        patch.setattr(dispatch, "_process_wide", None)
        verdicts = dispatch.default_dispatcher(files.cache_dir).verdicts
    verdicts.add("kernel 1x2", Verdict(True, "won"))
    assert verdicts["kernel 1x2"].uses_kernel


def keep_lines() -> None:
    with chat._history():
        readline.add_history("Hello")


KINDS: dict[str, Callable[[], None]] = {
    "step costs": keep_costs,
    "tuned layouts": keep_layout,
    "plain speeds": keep_speed,
    "verdicts on kernels": keep_verdict,
    "the lines that were typed": keep_lines,
}


@pytest.fixture(params=STATES)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_warned", {})
    monkeypatch.setattr(calibrate, "measure", lambda *_: COST)
    monkeypatch.setattr(calibrate, "_measured", {})
    STATES[request.param](monkeypatch, tmp_path / "cache")
    if request.param in ("full disk", "read-only"):  # this writer is written in C

        def write(path: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(readline, "write_history_file", write)
    return tmp_path / "cache"


COST = calibrate.StepCost((1,), (1, 768), (1.0,), (), (), (), None, ())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_warned_of_once(kind: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mtp_mlx"):
        KINDS[kind]()
        KINDS[kind]()
    assert [record.message.partition(" are not kept")[0] for record in caplog.records] == [kind]
    assert "MTP_MLX_CACHE" in caplog.text
    left = [path for path in cache.rglob("*") if path.is_file()] if cache.is_dir() else []
    assert [path.name for path in left] in ([], ["chat_history"])


def test_every_kind_is_named(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What could not be kept first does not hide the others; how to mend it is said at once."""
    with caplog.at_level(logging.WARNING, "mtp_mlx"):
        for keep in KINDS.values():
            keep()
    assert [record.message.partition(" are not kept")[0] for record in caplog.records] == list(KINDS)
    assert "MTP_MLX_CACHE" in caplog.records[0].message


def test_the_embedded_model_needs_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is converted into the cache, so there the missing home folder is an error, of one sentence."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    STATES["no home"](monkeypatch, tmp_path / "cache")
    result = CliRunner().invoke(main, ["generate", "-p", "the", "-n", "1"])
    assert result.exit_code == 2, result.output
    assert (
        result.stderr == "Error: there is no home folder: set MTP_MLX_CACHE to a folder that can be written\n"
    )


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("verb", ["info", "doctor"])
def test_this_machine_can_be_asked_about(
    verb: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    STATES[state](monkeypatch, tmp_path / "cache")
    result = CliRunner().invoke(main, [verb])
    assert result.exit_code == 0, result.output
    assert ("there is no home folder" in result.stdout) == (state in ("no home", "home of nobody"))
