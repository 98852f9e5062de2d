"""Proves that `doctor` says which lane every kernel is in and why, as text and as JSON."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mtp_mlx.cli import main
from mtp_mlx.cli.doctor import _lane
from mtp_mlx.metal_kernels import dispatch
from mtp_mlx.metal_kernels.dispatch import KERNELS, Dispatcher
from mtp_mlx.metal_kernels.verdicts import Verdict


@pytest.mark.skipif(mx.metal.is_available(), reason="says what a machine without Metal is told")
def test_without_metal_every_kernel_is_its_reference() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report["kernels"]) == set(KERNELS)
    for kernel in report["kernels"].values():
        assert kernel == {
            "lane": "reference",
            "reason": "no Metal on this machine",
            "shapes": {},
            "samples": {},
        }
    assert report["machine"]["versions"]["mlx"]


def test_text_names_each_kernel_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_KERNELS", "off")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    for name in KERNELS:
        assert any(
            line.split()[:2] == [name, "reference:"] and "MTP_MLX_KERNELS=off" in line
            for line in result.stdout.splitlines()
        )


def test_a_wrong_mode_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_KERNELS", "yes")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: MTP_MLX_KERNELS is 'yes'; it must be auto, off or force")


def test_stored_verdicts_are_shown_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Dispatcher("auto", lambda **_: None, "Metal")
    stored.verdicts.add("gated_lora a", Verdict(True, "won", 0.5))
    stored.verdicts.add("gated_lora b", Verdict(False, "lost", 1.5))
    stored.verdicts.add("row_exact c", Verdict(False, "lost", 2.0))
    monkeypatch.setattr(dispatch, "default_dispatcher", lambda *_: stored)
    text = CliRunner().invoke(main, ["doctor"]).stdout
    assert "gated_lora       kernel for some shapes: lost; won" in text
    assert "0.50 of MLX's time" in text and "1.50 of MLX's time" in text
    assert "row_exact        reference: lost" in text
    assert "verify_tail      undecided" in text
    forgotten = json.loads(CliRunner().invoke(main, ["doctor", "--forget", "--json"]).stdout)
    assert all(kernel["lane"] == "undecided" for kernel in forgotten["kernels"].values())


def test_lanes() -> None:
    won, lost, failed = Verdict(True, "won", 0.5), Verdict(False, "lost", 2.0), Verdict(False, "failed: x")
    assert _lane({"a": won}, {})["lane"] == "kernel"
    assert _lane({"a": lost}, {})["lane"] == "reference"
    assert _lane({"a": won, "b": lost}, {"s": lost})["lane"] == "kernel for some shapes"
    assert _lane({"a": won}, {"s": failed}) == {"lane": "reference", "reason": "failed: x"}
    assert "samples pass" in _lane({}, {"s": won})["reason"]
