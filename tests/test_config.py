"""One frozen dataclass holds every setting: YAML, options and dictionaries all lead to it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from mtp_mlx.config import from_dict, from_yaml, option_name, options_for, setting, to_dict
from mtp_mlx.errors import MTPError


@dataclass(frozen=True)
class Schedule:
    warm_up: int = setting(10, help="Warm up for this many steps", minimum=0)
    shape: Literal["cosine", "constant"] = setting("cosine", help="Follow this curve")


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = setting(1e-4, help="Scale every update", minimum=0)
    schedule: Schedule = setting(Schedule(warm_up=7), help="Schedule")


@dataclass(frozen=True)
class Settings:
    model: str = setting(help="Load this model", flag="-m")
    steps: int = setting(100, help="Take this many steps", minimum=1, maximum=1000)
    rank: Literal[4, 8] = setting(8, help="Rank of the adapter")
    out: Path = field(default=Path("out"), metadata={"help": "Write here"})
    resume: bool = setting(True, help="Go on where a run stopped")
    limit: int | None = setting(None, help="Stop after this many rows")
    targets: tuple[str, ...] = setting(("q_proj", "v_proj"), help="Adapt these modules")
    optimizer: Optimizer = setting(Optimizer(learning_rate=3e-4), help="Optimizer")


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_come_from_the_dataclass_and_yaml_and_options_go_on_top(tmp_path):
    path = written(
        tmp_path,
        "model: tiny\nsteps: 5\nlimit: 3\ntargets: [o_proj]\noptimizer:\n  schedule: {shape: constant}\n",
    )
    got = from_yaml(
        Settings, path, {"steps": 6, "limit": None, "targets": (), "optimizer__schedule__warm_up": 0}
    )
    schedule = Schedule(warm_up=0, shape="constant")
    assert got == Settings("tiny", steps=6, limit=3, targets=("o_proj",), optimizer=Optimizer(3e-4, schedule))


def test_a_nested_mapping_keeps_the_parents_defaults(tmp_path):
    got = from_yaml(Settings, written(tmp_path, "model: t\noptimizer: {schedule: {shape: constant}}"))
    assert got.optimizer == Optimizer(3e-4, Schedule(7, "constant"))
    assert from_yaml(Settings, None, {"model": "t"}) == Settings("t")
    assert from_yaml(Optimizer, written(tmp_path, "")) == Optimizer()


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path):
    assert from_yaml(Optimizer, written(tmp_path, "learning_rate: 1e-5")).learning_rate == 1e-5
    assert from_yaml(Optimizer, written(tmp_path, "learning_rate: 1")).learning_rate == 1.0


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: t\nstepps: 5", ["run.yaml", "'stepps'", "Did you mean 'steps'?"]),
        ("model: t\noptimizer: {learning_rat: 1}", ["run.yaml: optimizer", "Did you mean 'learning_rate'?"]),
        ("model: t\nzzz: 5", ["'zzz'", "Known settings: model, steps"]),
        ("model: t\nsteps: many", ["run.yaml: steps must be a whole number, not 'many' (text)"]),
        ("model: t\nsteps: 1.5", ["steps must be a whole number, not 1.5 (number)"]),
        ("model: t\nsteps: true", ["steps must be a whole number, not True (true or false)"]),
        ("model: 5", ["model must be text, not 5"]),
        ("model:", ["model must be text, not None (nothing)"]),
        ("model: t\nresume: 1", ["resume must be true or false, not 1"]),
        ("model: t\ntargets: q_proj", ["targets must be a list, not 'q_proj'"]),
        ("model: t\ntargets: [q, 3]", ["targets[1] must be text, not 3"]),
        ("model: t\nout: 3", ["out must be a path, not 3"]),
        ("model: t\noptimizer: 3", ["optimizer must be a mapping of settings, not 3"]),
        ("model: t\noptimizer: {learning_rate: fast}", ["learning_rate must be a number, not 'fast'"]),
        ("model: t\nsteps: 0", ["steps must be at least 1, not 0"]),
        ("model: t\nsteps: 2000", ["steps must be at most 1000, not 2000"]),
        ("model: t\noptimizer: {learning_rate: .nan}", ["learning_rate must be at least 0, not nan"]),
        ("model: t\noptimizer: {schedule: {shape: cosin}}", ["one of cosine, constant", "mean 'cosine'?"]),
        ("steps: 5", ["--model is missing", "run.yaml"]),
        ("model: [1", ["run.yaml, line", "invalid YAML"]),
        ("steps: 1\nsteps: 2", ["run.yaml, line 2", "'steps' occurs twice"]),
        ("- 1\n- 2", ["run.yaml", "setting: value", "list"]),
    ],
)
def test_errors_name_file_setting_and_remedy(tmp_path, text, parts):
    with pytest.raises(MTPError) as caught:
        from_yaml(Settings, written(tmp_path, text))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_missing_file_and_a_bad_option(tmp_path):
    with pytest.raises(MTPError, match="cannot be read"):
        from_yaml(Settings, tmp_path / "none.yaml")
    with pytest.raises(MTPError, match="--steps must be at least 1"):
        from_yaml(Settings, None, {"model": "t", "steps": 0})
    with pytest.raises(MTPError, match=r"--model is missing\. Give the option\.$"):
        from_yaml(Settings, None)


def test_dictionary_round_trip():
    config = Settings("t", out=Path("a/b"), targets=("x",), optimizer=Optimizer(schedule=Schedule(1)))
    plain = to_dict(config)
    assert plain["out"] == "a/b"
    assert plain["optimizer"]["schedule"]["warm_up"] == 1
    assert from_dict(Settings, plain, "here") == config


@click.command()
@options_for(Settings)
def command(**options):
    click.echo(repr(options) + "\n" + repr(from_yaml(Settings, None, options)))


def test_options_not_given_are_none_so_that_defaults_have_one_home():
    given, config = CliRunner().invoke(command, ["--model", "t"]).output.strip().split("\n")
    assert config == repr(Settings("t"))
    expected = {"model": "t", "targets": ()}
    assert {key: value for key, value in eval(given).items() if value is not None} == expected


def test_every_kind_of_option():
    arguments = "-m t --steps 9 --rank 4 --out x --no-resume --limit 2 --targets a --targets b"
    arguments += " --optimizer-learning-rate 0.5 --optimizer-schedule-shape constant"
    result = CliRunner().invoke(command, arguments.split())
    expected = Settings("t", 9, 4, Path("x"), False, 2, ("a", "b"), Optimizer(0.5, Schedule(7, "constant")))
    assert result.output.strip().split("\n")[1] == repr(expected)
    assert CliRunner().invoke(command, ["--rank", "5"]).exit_code == 2


def test_help_shows_every_setting_with_its_default():
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for leaf in [*fields(Settings)[:-1], *fields(Schedule)]:
        assert leaf.metadata["help"] in text
    assert "--optimizer-schedule-warm-up INTEGER" in text
    for default in ("(100)", "(on)", "(q_proj, v_proj)", "(7)", "(0.0003)"):
        assert f"default: {default}" in text
    assert option_name("optimizer__learning_rate") == "--optimizer-learning-rate"
