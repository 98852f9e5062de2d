"""How many tokens an unverified step emits, and which settings are refused."""

from __future__ import annotations

import math

import pytest

from mtp_mlx.decode.emission import Emission, sure_run
from mtp_mlx.errors import MTPError


@pytest.mark.parametrize(
    ("confidences", "tau", "count"),
    [
        ([0.95, 0.92, 0.85, 0.97], 0.9, 2),  # the leading run, not a count (the reference's example)
        ([0.9, 0.9, 0.1], 0.9, 2),  # equal to tau passes
        ([0.2, 0.99, 0.99], 0.9, 1),  # one at least, and none behind a doubtful first token
        ([0.99, 0.99], 0.9, 2),
        ([1.0, 1.0, 1.0], 1.0, 1),  # a float32 probability can round to 1
        ([math.nan, 0.99], 0.9, 1),
        ([0.95], 0.9, 1),
    ],
)
def test_conf_adapt_emits_the_leading_run(confidences: list[float], tau: float, count: int) -> None:
    assert Emission("conf-adapt", tau).count(confidences) == count


@pytest.mark.parametrize(
    ("confidences", "count"),
    [([0.2, 0.99, 0.95, 0.3], 3), ([0.2, 0.5, 0.99], 1), ([0.2], 1), ([0.99, 0.9], 2)],
)
def test_tau_is_not_asked_of_the_base_models_own_pick(confidences: list[float], count: int) -> None:
    assert Emission("conf-adapt", 0.9).count(confidences, own_pick=True) == count
    assert Emission("conf-adapt", 1.0).count(confidences, own_pick=True) == 1


def test_static_emits_everything() -> None:
    assert Emission("static").count([0.0, 0.0, 0.0]) == 3


def test_drafts_are_submitted_up_to_the_first_doubt() -> None:
    assert sure_run([], 0.5) == 0
    assert sure_run([0.5, 0.6, 0.4, 0.9], 0.5) == 2
    assert sure_run([1.0], 1.0) == 0


def test_defaults_and_labels() -> None:
    assert Emission().lossless and Emission().threshold is None and Emission().label("auto") == "auto"
    assert Emission("conf-adapt").threshold == 0.9 and not Emission("conf-adapt").lossless
    assert Emission("conf-adapt", 0.8).label("auto") == "conf-adapt tau 0.8"
    assert Emission("static").label("auto") == "static" and not Emission("static").lossless
    assert Emission("verified", 0.8).label("linear") == "linear tau 0.8"
    assert Emission("verified", 0.8).label("quadratic") == "quadratic tau 0.8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lossy",), "unknown emission 'lossy': choose one of verified, conf-adapt, static"),
        (("conf-adapt", 0.0), "above 0 and at most 1; got 0.0"),
        (("conf-adapt", 1.5), "above 0 and at most 1; got 1.5"),
        (("conf-adapt", math.nan), "above 0"),
        (("static", 0.9), "has no tau"),
        (("verified", 0.9, True), "`first_token_sampling` is for unverified"),
    ],
)
def test_bad_settings(arguments: tuple, message: str) -> None:
    with pytest.raises(MTPError, match=message):
        Emission(*arguments)
