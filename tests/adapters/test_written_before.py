"""Adapter folders that an older version wrote load unchanged, and draft the tokens that it drafted with them.

Each folder here was written by commit 4398f10 for the same tiny model, by `mtp-mlx train` or `mtp-mlx convert` (the
parallel heads by its `save_heads`). Its `drafted.json` holds what that commit then wrote and drafted, greedily and at
temperature 0.7: for every step the drafts that were verified, and how many were accepted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.adapter_folder import CONFIG_NAME, read_header, write_header
from mtp_mlx.api import load
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import ChainPolicy, FixedPolicy, Policy, Proposal
from mtp_mlx.errors import MTPError
from mtp_mlx.models import bundled_adapter, named_adapter
from tests.tiny import save_tiny

HERE = Path(__file__).parent
KINDS = sorted(path.parent.name for path in HERE.glob(f"*/{CONFIG_NAME}"))
BASE: dict[str, Any] = {
    "seed": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that all of these adapters were made for."""
    return save_tiny(tmp_path_factory.mktemp("base"), "llama", **BASE)


def recording(policy: Policy) -> list[dict[str, Any]]:
    """The steps that `policy` will have been told of, as `drafted.json` has them."""
    steps: list[dict[str, Any]] = []

    def observe(proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        steps.append({"drafts": proposal.drafts[: layout.drafts], "accepted": len(tokens) - 1})

    policy.observe = observe  # type: ignore[method-assign]
    return steps


def test_every_kind_is_there() -> None:
    methods = {kind: read_header(HERE / kind).method for kind in KINDS}
    assert methods == {
        "conf-adapt": "mask-tokens",
        "converted-heads": "mtp-heads",
        "mask-tokens": "mask-tokens",
        "medusa": "mtp-heads",
        "mtp-heads": "mtp-heads",
        "parallel": "mtp-heads",
        "ptp-c": "ptp",
        "ptp-o": "ptp",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_drafts_are_those_of_before(kind: str, base: Path) -> None:
    recorded = json.loads((HERE / kind / "drafted.json").read_text())
    model, _ = load(str(base), HERE / kind)
    for run in recorded["runs"]:
        count = recorded["drafts"]
        policy = ChainPolicy(count) if recorded["policy"] == "chain" else FixedPolicy("linear", count)
        steps = recording(policy)
        sampling = SamplingConfig(temperature=run["temperature"], seed=run["seed"])
        tokens = mtp_generate_step(
            run["prompt"], model, max_tokens=len(run["text"]), sampling=sampling, policy=policy
        )
        assert [token.token for token in tokens] == run["text"], run["prompt"]
        assert steps == run["steps"], run["prompt"]
    assert sum(step["accepted"] for run in recorded["runs"] for step in run["steps"]) > 10


def _name(folder: str | Path) -> str:
    return Path(folder).name


@pytest.mark.parametrize(
    "folder", [HERE / kind for kind in KINDS] + ["smollm2-135m", "demo-heads"], ids=_name
)
def test_a_header_that_is_written_again_is_the_same(folder: str | Path, tmp_path: Path) -> None:
    """The bundled adapters' too; byte for byte, but for the order of keys and for sections that are empty."""
    path = bundled_adapter(folder) or named_adapter(folder)
    write_header(tmp_path, read_header(path))
    before, after = ((one / CONFIG_NAME).read_text() for one in (path, tmp_path))
    kept = {
        key: value for key, value in json.loads(before).items() if value != {} or key in json.loads(after)
    }
    assert json.dumps(kept, sort_keys=True) == json.dumps(json.loads(after), sort_keys=True)
    if isinstance(folder, str):
        assert after == before


@pytest.mark.parametrize(
    ("kind", "section", "key", "value"),
    [
        ("mask-tokens", "adapter", "alpha", None),
        ("mask-tokens", "adapter", "rank", 3.5),
        ("ptp-o", "adapter", "rank", "x"),
        ("mtp-heads", "heads", "blocks", 7),
    ],
)
def test_a_damaged_section_is_one_sentence(
    kind: str, section: str, key: str, value: Any, base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(HERE / kind, folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config[section][key] = value
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(MTPError, match="is damaged"):
        load(str(base), folder)
