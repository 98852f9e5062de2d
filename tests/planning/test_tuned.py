"""Proves that layout "auto" does what was tuned for that model and adapter, unless the user says otherwise."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mtp_mlx.api import stream_generate
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.planning.choose import plan_drafting
from mtp_mlx.planning.tuned import TunedChoice, forget, recall, remember
from tests.decode.fakes import random_adapter
from tests.tiny import tiny_model, tiny_tokenizer

FAST = TunedChoice("quadratic 2 slots", "quadratic", 2, "slots", 30.0, 20.0)
PLAIN = TunedChoice("plain", "plain", None, None, 20.0, 20.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))


def model(seed: int = 0) -> AttachedModel:
    base = tiny_model("llama", seed=3)
    return attach(base, random_adapter(base, seed=seed))


def generated(attached: AttachedModel, **options: Any) -> tuple[list[int], DecodeStats]:
    stats = DecodeStats()
    responses = stream_generate(attached, tiny_tokenizer(), [3, 1, 4, 1, 5], 24, stats=stats, **options)
    return [response.token for response in responses], stats


def test_auto_does_what_was_tuned_and_says_so() -> None:
    attached = model()
    plain, _ = generated(attached, layout="plain")
    untuned, stats = generated(attached)
    assert untuned == plain and stats.tuned == "" == stats.to_json()["tuned"]
    remember(attached, FAST, {"lanes": []})
    tuned, stats = generated(attached)
    assert tuned == plain
    assert stats.tuned == "tuned: quadratic 2 slots, 1.50x plain" == stats.to_json()["tuned"]
    assert all(name.split("/")[1] in ("2", "2+2", "2+2+2") for name in stats.layouts), stats.layouts
    remember(attached, PLAIN, {})
    tuned, stats = generated(attached)
    assert (
        tuned == plain
        and set(stats.layouts) == {"0/0"}
        and stats.tuned == "tuned: nothing beat plain decoding"
    )


@pytest.mark.parametrize(
    "options",
    [{"drafts": 3}, {"lookup": True}, {"lookup": False}, {"drafter": "slots,lookup"}, {"layout": "linear"}],
)
def test_the_user_s_word_goes_first(options: dict[str, Any]) -> None:
    attached = model()
    remember(attached, PLAIN, {})
    stats = DecodeStats()
    arguments = {"layout": "auto", "drafts": None, **options}
    assert plan_drafting(attached, stats=stats, **arguments).policy.max_drafts > 0 and stats.tuned == ""


def test_an_emission_is_not_tuned() -> None:
    attached, stats = model(), DecodeStats()
    remember(attached, PLAIN, {})
    assert plan_drafting(attached, "auto", None, stats, emission=Emission(tau=0.5)).policy.max_drafts
    assert stats.tuned == ""


def test_another_training_another_model_and_no_adapter_are_not_tuned() -> None:
    attached, other = model(), model(seed=1)
    path = remember(attached, FAST, {})
    assert recall(attached) == FAST and recall(model()) == FAST
    assert recall(other) is None
    assert recall(attach(tiny_model("llama", seed=3))) is None
    base = tiny_model("llama", seed=4)
    assert recall(attach(base, random_adapter(base))) is None
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "key": {**stored["key"], "mlx": "0"}}))
    assert recall(attached) is None, "a file by that name of another key"


@pytest.mark.parametrize("damage", ["{", "[]", '{"choice": {"layout": "plain"}}', "cubic"])
def test_a_damaged_record_is_said_and_not_used(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    attached = model()
    path = remember(attached, FAST, {})
    path.write_text(path.read_text().replace('"quadratic"', '"cubic"') if damage == "cubic" else damage)
    with caplog.at_level(logging.WARNING, "mtp_mlx"):
        assert recall(attached) is None
    assert "run mtp-mlx tune again" in caplog.text


def test_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    attached = model()
    assert not forget(attached)
    remember(attached, FAST, {})
    assert forget(attached) and recall(attached) is None
    remember(attached, FAST, {})

    def refused(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(MTPError, match="could not be removed"):
        forget(attached)


def test_the_key_does_not_depend_on_the_thread_s_lazy_state() -> None:
    attached = model()
    remember(attached, FAST, {})
    mx.eval(attached.model.parameters())
    generated(attached, layout="quadratic")
    assert recall(attached) == FAST
