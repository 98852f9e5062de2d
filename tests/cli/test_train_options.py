"""Proves that a training method takes the settings it reads and no others, however it is named: as a command, with
`--method`, in a YAML file, or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
from click.testing import CliRunner

from mtp_mlx.cli import main
from mtp_mlx.cli.train import command
from mtp_mlx.cli.train_options import OF_SOME_METHODS, SETTINGS, EverySetting, settings_from
from mtp_mlx.drafters.registry import ROOMS, method_class, settings_class, training_methods, trains
from mtp_mlx.errors import MTPError
from mtp_mlx.train.method import Method
from mtp_mlx.train.settings import TrainSettings

METHODS = training_methods()
FILES: dict[str, Any] = {"data": Path("data.jsonl"), "out": Path("adapter")}


def help_of(*words: str) -> str:
    result = CliRunner().invoke(main, ["train", *words, "--help"], terminal_width=200)
    assert result.exit_code == 0, result.output
    return result.output


def config_file(folder: Path, **values: Any) -> Path:
    path = folder / "train.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    return path


# --- what is declared ---------------------------------------------------------------------------------------


def test_every_room_declares_the_methods_that_it_is_listed_with() -> None:
    for room in ROOMS:
        if room.trains:
            assert tuple(room.module("options").TRAINS) == room.trains, room.name
    for name in METHODS:
        assert settings_class(name).method == name
        assert issubclass(settings_class(name), TrainSettings) and issubclass(method_class(name), Method)
    with pytest.raises(MTPError, match="no training method 'medusa': choose one of mask-tokens, "):
        settings_class("medusa")


def test_a_name_means_one_setting_in_all_methods() -> None:
    """Otherwise a YAML file without a method, or a checkpoint's settings, would not say which is meant."""
    for cls in map(settings_class, METHODS):
        for field in dataclasses.fields(cls):
            same = EverySetting.__dataclass_fields__[field.name]
            assert (same.default, same.metadata["minimum"], same.metadata["maximum"]) == (
                field.default, field.metadata["minimum"], field.metadata["maximum"],
            ), (cls, field.name)  # fmt: skip
            assert get_type_hints(EverySetting)[field.name] == get_type_hints(cls)[field.name]


# --- help ---------------------------------------------------------------------------------------------------


def test_the_help_of_train_lists_the_methods_and_what_all_of_them_read() -> None:
    text = help_of()
    for name in METHODS:
        assert f"  {name}" in text and trains(name).help in text
    for field in dataclasses.fields(TrainSettings):
        assert f"--{field.name.replace('_', '-')} " in text, field.name
    for name in OF_SOME_METHODS:
        assert f"--{name.replace('_', '-')} " not in text, name


@pytest.mark.parametrize("method", METHODS)
def test_the_help_of_a_method_lists_what_it_reads(method: str) -> None:
    text = help_of(method)
    for name in SETTINGS[method]:
        assert f"--{name.replace('_', '-')} " in text, name
    for name in OF_SOME_METHODS - SETTINGS[method]:
        assert f"--{name.replace('_', '-')} " not in text, name
    assert text.index(f"Options of {method}:") < text.index("Options of all methods:")


@pytest.mark.parametrize("method", METHODS)
def test_a_command_refuses_the_options_of_other_methods(method: str) -> None:
    for name in OF_SOME_METHODS - SETTINGS[method]:
        option = f"--{name.replace('_', '-')}"
        result = CliRunner().invoke(main, ["train", method, option, "1"])
        assert result.exit_code == 2 and f"Error: {option} is a setting of " in result.stderr, result.output
        assert f", not of {method}" in result.stderr


# --- how a method is named ----------------------------------------------------------------------------------


def test_a_method_may_be_a_command_an_option_or_in_a_file(tmp_path: Path) -> None:
    expected = settings_class("mtp-heads")(**FILES, heads=2)
    config = config_file(tmp_path, method="mtp-heads", heads=2, data="data.jsonl", out="adapter")
    assert settings_from(None, {**FILES, "heads": 2}, "mtp-heads") == expected
    assert settings_from(None, {**FILES, "heads": 2, "method": "mtp-heads"}) == expected
    assert settings_from(config, {}) == settings_from(config, {}, "mtp-heads") == expected
    assert settings_from(config, {"method": "mtp-heads", "heads": 3}).heads == 3  # type: ignore[attr-defined]
    plain = settings_from(config_file(tmp_path, data="data.jsonl", out="adapter", slots=2), {})
    assert plain == settings_class("mask-tokens")(**FILES, slots=2)


def test_a_file_for_another_method_than_the_command_is_refused(tmp_path: Path) -> None:
    config = config_file(tmp_path, method="ptp", data="data.jsonl", out="adapter")
    with pytest.raises(MTPError, match="`method` is ptp, and the command trains mtp-heads"):
        settings_from(config, {}, "mtp-heads")


def test_options_before_the_method_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[dict[str, Any], str | None]] = []

    def remember(context: click.Context, options: dict[str, Any], method: str | None = None) -> None:
        seen.append(({name: value for name, value in options.items() if value not in (None, ())}, method))

    monkeypatch.setattr("mtp_mlx.cli.train._train", remember)
    words = ["--seed", "3", "--steps", "7", "--json", "mtp-heads", "--steps", "9", "--held-out", "0"]
    assert CliRunner().invoke(command, words).exit_code == 0
    assert seen == [({"seed": 3, "steps": 9, "held_out": 0, "as_json": True}, "mtp-heads")]
    assert CliRunner().invoke(command, ["ptp", "--no-independent"]).exit_code == 0
    assert seen[1] == ({"independent": False, "as_json": False}, "ptp")


# --- settings of other methods ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("mtp-heads", {"objective": "apple"}, r"`objective` \(apple\) is a setting of mask-tokens, not of mtp-heads"),
        ("mtp-heads", {"greedy_share": 0.5}, r"`greedy_share` \(0.5\) is a setting of ptp, not of mtp-heads"),
        ("mtp-heads", {"rank": 8, "slots": 2}, r"`slots` \(2\) is a setting of .*; `rank` \(8\) is a setting of "),
        ("mtp-heads", {"rank": 8}, "of mask-tokens, conf-adapt and ptp, not of mtp-heads"),
        ("mask-tokens", {"ce_weight": 0.5}, "`ce_weight` .* is a setting of mtp-heads, not of mask-tokens"),
        ("mask-tokens", {"tuning": "full"}, "`tuning` .* is a setting of conf-adapt, not of mask-tokens"),
        ("mask-tokens", {"variant": "c"}, "`variant` .* is a setting of ptp, not of mask-tokens"),
        ("conf-adapt", {"objective": "apple"}, "`objective` .* not of conf-adapt"),
        ("conf-adapt", {"depth_decay": 0.5}, "of mask-tokens, mtp-heads and ptp, not of conf-adapt"),
        ("conf-adapt", {"uniforms": "own"}, "`uniforms` .* not of conf-adapt"),
        ("ptp", {"objective": "apple"}, "`objective` .* not of ptp"),
    ],
)  # fmt: skip
def test_a_setting_of_another_method_is_refused(
    tmp_path: Path, method: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MTPError, match=message):
        settings_from(None, {**FILES, **changes, "method": method})
    with pytest.raises(MTPError, match=message):
        settings_from(config_file(tmp_path, data="d", out="o", **changes), {}, method)


def test_a_setting_of_another_method_at_its_default_is_not(tmp_path: Path) -> None:
    """So one file of all settings serves several methods."""
    values = {
        "slots": 4,
        "objective": "self-distill",
        "top_share": 0.08,
        "data": "data.jsonl",
        "out": "adapter",
    }
    for method in METHODS:
        found = settings_from(config_file(tmp_path, method=method, **values), {})
        assert found == settings_class(method)(**FILES)


def test_the_command_line_speaks_of_options() -> None:
    result = CliRunner().invoke(
        main, ["train", "--method", "ptp", "--data", "d", "--out", "o", "--heads", "2"]
    )
    assert result.exit_code == 2
    assert "Error: --heads (2) is a setting of mtp-heads, not of ptp" in result.stderr
