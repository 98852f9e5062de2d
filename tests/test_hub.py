"""Proves that adapters go to a hub and come back the same, with a true card, and that every failure is a sentence.

No network: a fake of huggingface_hub's client keeps repositories in a folder and raises what the real one raises.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import errors

from mtp_mlx import hub
from mtp_mlx.adapter_folder import read_header
from mtp_mlx.cli import main
from mtp_mlx.config import from_yaml
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.drafters.masks.options import MaskTokenSettings
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import random_adapter
from tests.tiny import tiny_model
from tests.train.training import trainer_for

REPOSITORY = "someone/tiny-mtp"


class FakeHub:
    """Repositories below a folder; `fails` is raised by the next call."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fails = folder, None
        self.private: dict[str, bool] = {}

    def _fail(self) -> None:
        if self.fails is not None:
            raise self.fails

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self._fail()
        assert exist_ok
        self.private.setdefault(repo_id, private)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str
    ) -> Any:
        self._fail()
        assert set(allow_patterns) == set(hub.FILES) and commit_message
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(repo_url=f"https://hub.invalid/{repo_id}")

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self._fail()
        if revision == "v9":
            raise error(errors.RevisionNotFoundError, 404)
        if not (self.folder / repo_id).is_dir():
            raise error(errors.RepositoryNotFoundError, 404)
        return str(self.folder / repo_id)


def error(kind: Any, status: int) -> Exception:
    """An error of huggingface_hub with the response it came from."""
    made = kind.__new__(kind)
    Exception.__init__(made, f"{status} Client Error (Request ID: x)\n\nsomething long")
    made.response = SimpleNamespace(status_code=status, headers={})
    return made


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "hub_api", lambda: fake)
    return fake


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter whose base was a hub id, with a stranger's file beside it."""
    base = tiny_model("llama", seed=3)
    weights = random_adapter(base)
    info = mask_header(weights.config, "someone/tiny", base_fingerprint(base), acceptance=[0.61, 0.42])
    save_adapter(tmp_path / "adapter", weights, info)
    (tmp_path / "adapter" / "diary.txt").write_text("not for others")
    return tmp_path / "adapter"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_there_and_back(fake: FakeHub, adapter: Path, tmp_path: Path) -> None:
    pushed = run("push", adapter, REPOSITORY, "--data", "tales, 20 of them", "--license", "cc0-1.0")
    assert pushed.exit_code == 0 and pushed.stdout == f"https://hub.invalid/{REPOSITORY}\n", pushed.output
    assert fake.private == {REPOSITORY: True}
    assert sorted(path.name for path in (fake.folder / REPOSITORY).iterdir()) == sorted(hub.FILES)
    pulled = run("pull", REPOSITORY, "--out", tmp_path / "back", "--json")
    assert pulled.exit_code == 0, pulled.output
    assert json.loads(pulled.stdout) == {
        "out": str(tmp_path / "back"), "base": "someone/tiny", "method": "mask-tokens", "acceptance": [0.61, 0.42],
    }  # fmt: skip
    model = tiny_model("llama", seed=3)
    first, second = (load_folder(folder, model)[0].tensors() for folder in (adapter, tmp_path / "back"))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all().item() for name in first)
    assert read_header(tmp_path / "back") == read_header(adapter)
    again = run("pull", REPOSITORY, "--out", tmp_path / "back")
    assert again.exit_code == 0 and "mtp-mlx generate --model someone/tiny --adapter" in again.stdout
    assert "acceptance by depth 0.61 0.42" in again.stderr


def test_the_card(fake: FakeHub, adapter: Path) -> None:
    result = run("push", adapter, REPOSITORY, "--dry-run", "--data", "tales", "--license", "cc0-1.0")
    assert result.exit_code == 0 and not fake.folder.exists() and not fake.private
    _, front, text = result.stdout.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "mtp-mlx", "pipeline_tag": "text-generation",
        "tags": ["mlx", "mtp-mlx", "speculative-decoding"],
        "base_model": "someone/tiny", "base_model_relation": "adapter", "license": "cc0-1.0",
    }  # fmt: skip
    fingerprint = read_header(adapter).base_fingerprint
    for said in (
        "# tiny-mtp", f"someone/tiny, fingerprint `{fingerprint}`", "gated-LoRA mask tokens ([arXiv 2507.11851]",
        "tales", "acceptance per depth on held-out text: 0.61 / 0.42", "slots 4", "does not record the settings",
        f"mtp-mlx pull {REPOSITORY} --out adapter",
    ):  # fmt: skip
        assert said in text, said


def test_the_command_to_reproduce_gives_the_same_settings(tmp_path: Path) -> None:
    """Of a trained adapter: its words, read as options again, are the settings it was trained with."""
    trainer = trainer_for(tmp_path / "adapter", steps=2, warmup=1, learning_rate=3e-4, grad_checkpoint=True)
    trainer.resume()
    assert trainer.run()
    header, card = hub.published(tmp_path / "adapter", REPOSITORY, hub.Description(base="someone/tiny"))
    assert f"10 examples, fingerprint `{header.training['data_fingerprint']}`." in card
    line = next(line for line in card.splitlines() if line.startswith("mtp-mlx train mask-tokens "))
    words = line.split()[3:]
    options = {word: value for word, value in zip(words, words[1:], strict=False) if word.startswith("--")}
    values = {name[2:].replace("-", "_"): value for name, value in options.items()}
    values.pop("out"), values.pop("data")
    assert values.pop("model") == "someone/tiny"
    ours = {name: getattr(trainer.settings, name) for name in values}
    theirs = {name: type(ours[name])(value) for name, value in values.items()}
    assert theirs == ours and {"steps", "learning_rate", "slots", "rank"} <= ours.keys()
    replayed = from_yaml(MaskTokenSettings, None, {**theirs, "data": Path("d"), "out": Path("o")})
    for name in ("steps", "rank", "alpha", "warmup", "micro_batches", "schedule", "objective", "seed"):
        assert getattr(replayed, name) == getattr(trainer.settings, name), name


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        (errors.RepositoryNotFoundError, 404, "there is no such repository, or it is private"),
        (errors.GatedRepoError, 403, "its owners grant access on request"),
        (errors.HfHubHTTPError, 401, "your login does not allow it (401)"),
        (errors.HfHubHTTPError, 500, "the hub answered 500"),
        (errors.LocalTokenNotFoundError, 0, "you are not logged in; run `hf auth login`"),
        (errors.OfflineModeIsEnabled, 0, "the hub cannot be reached"),
        (errors.LocalEntryNotFoundError, 0, "the hub cannot be reached"),
        (ConnectionError, 0, "the hub cannot be reached"),
        (errors.HFValidationError, 0, "give OWNER/NAME"),
        (OSError, 0, "Client Error"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(
    fake: FakeHub, adapter: Path, tmp_path: Path, kind: Any, status: int, said: str
) -> None:
    fake.fails = error(kind, status)  # type: ignore[assignment]
    for words in (["push", adapter, REPOSITORY], ["pull", REPOSITORY, "--out", tmp_path / "back"]):
        result = run(*words)
        assert result.exit_code == 2 and said in result.stderr and result.stdout == "", result.output
        assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("Error: ")
    assert not (tmp_path / "back").exists()


def test_errors_that_are_not_the_hubs_stay_themselves() -> None:
    with pytest.raises(ZeroDivisionError), hub.hub_errors("x"):
        raise ZeroDivisionError
    timeout = type("ConnectTimeout", (Exception,), {"__module__": "httpx._exceptions"})
    with pytest.raises(MTPError, match="the hub cannot be reached"), hub.hub_errors("x"):
        raise timeout("timed out")


def test_first_mistakes(fake: FakeHub, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    for words, said in (
        (["push", tmp_path / "nowhere", REPOSITORY], "is not a folder"),
        (["push", tmp_path / "other", REPOSITORY], "is not an adapter folder"),
        (["push", adapter, "no-owner"], "'no-owner' is not a repository's name: give OWNER/NAME"),
        (["pull", "no-owner"], "'no-owner' is not a repository's name: give OWNER/NAME"),
        (["pull", "nobody/nothing", "--out", tmp_path / "x"], "there is no such repository"),
        (["pull", REPOSITORY, "--out", tmp_path / "other"], "is a folder with other files"),
    ):
        result = run(*words)
        assert result.exit_code == 2 and said in result.stderr, result.output
    assert run("push", adapter, REPOSITORY).exit_code == 0
    assert "no such revision" in run("pull", REPOSITORY, "-o", tmp_path / "x", "--revision", "v9").stderr
    (fake.folder / REPOSITORY / "mtp.safetensors").write_bytes(b"damaged")
    result = run("pull", REPOSITORY, "--out", tmp_path / "x")
    assert result.exit_code == 2 and f"{REPOSITORY} holds no adapter of mtp-mlx" in result.stderr
    assert not (tmp_path / "x").exists()


def test_a_path_of_this_machine_is_not_published(fake: FakeHub, adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "mtp_config.json").read_text())
    config["base"]["name"] = str(tmp_path / "my" / "model")
    (adapter / "mtp_config.json").write_text(json.dumps(config))
    refused = run("push", adapter, REPOSITORY)
    assert refused.exit_code == 2 and "give --base OWNER/NAME" in refused.stderr and not fake.folder.exists()
    assert run("push", adapter, REPOSITORY, "--base", "someone/model", "--public").exit_code == 0
    published = [path.read_bytes() for path in (fake.folder / REPOSITORY).iterdir()]
    assert not any(str(tmp_path).encode() in content for content in published)
    assert read_header(fake.folder / REPOSITORY).base_name == "someone/model" and fake.private == {
        REPOSITORY: False
    }
