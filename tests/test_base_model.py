"""Proves that models are loaded in one way: what the hub raises is a sentence, and what works is not refused."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

import mtp_mlx
import mtp_mlx.base_model as base_model
from mtp_mlx.base_model import load_base
from mtp_mlx.cli import main
from mtp_mlx.errors import MTPError
from tests.tiny import ARCHITECTURES, RECURRENT, WINDOWED, save_tiny

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *WINDOWED, *sorted(set(RECURRENT) - {"qwen3_5"})])
def test_what_mlx_lm_loads_is_loaded(architecture: str, tmp_path: Path) -> None:
    model, tokenizer = load_base(save_tiny(tmp_path / "model", architecture))
    assert model.layers and len(tokenizer) > 1


def test_a_model_type_that_ends_the_program_is_a_sentence(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "olmo"}))
    with pytest.raises(MTPError, match="needs one more package for the model type 'olmo': install"):
        load_base(folder)


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> Path:
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot: HF_HUB_OFFLINE")

    monkeypatch.setattr(base_model, "_download", offline)
    with pytest.raises(
        MTPError, match=r"owner/name could not be fetched: the hub cannot be reached, and the local"
    ):
        load_base("owner/name")


def test_a_repository_that_does_not_exist_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        status_code, headers, request = 404, {}, None

    def missing(*_: object, **__: object) -> Path:
        raise RepositoryNotFoundError("404", response=Answer())  # type: ignore[arg-type]

    monkeypatch.setattr(base_model, "_download", missing)
    with pytest.raises(MTPError, match="owner/name could not be fetched: there is no such repository"):
        load_base("owner/name")


def test_a_repository_without_a_model_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(base_model, "_download", lambda _: tmp_path)
    with pytest.raises(MTPError, match="owner/name could not be loaded: it has no config.json"):
        load_base("owner/name")


def configured(folder: Path, name: str, **changes: object) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **changes}))


def test_code_of_its_own_runs_only_where_its_makers_are_trusted(tmp_path: Path) -> None:
    """Of the model and of the tokenizer, as in mlx-lm."""
    plain, folder = (save_tiny(tmp_path / name, seed=3) for name in ("plain", "model"))
    (folder / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    configured(folder, "config.json", model_file="own.py", model_type="own")
    trust = "give `trust_remote_code` if you trust its makers"
    with pytest.raises(MTPError, match=rf"it runs code of its own \(own.py\): {trust}"):
        load_base(folder)
    texts = []
    for path, trusted in ((plain, False), (folder, True)):
        model, tokenizer = mtp_mlx.load(str(path), None, trust_remote_code=trusted)
        texts.append(mtp_mlx.generate(model, tokenizer, "the fox", max_tokens=8))
    assert texts[0] == texts[1] != ""
    configured(
        plain, "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]}
    )
    with pytest.raises(MTPError, match=f"its tokenizer runs code of its own: {trust}"):
        load_base(plain)


@pytest.mark.parametrize(
    "words",
    ["generate -p a", "cache-prompt -p a -o a.safetensors", "bench", "tune", "eval", "distill -p {data} -o a.jsonl"]
    + ["train mtp-heads -d {data} -o a", "remember {data} -o a.mem"],
)  # fmt: skip
def test_every_verb_that_runs_a_model_can_be_told_to_trust_it(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, trust_remote_code: bool = False, **__: object) -> None:
        raise MTPError(f"trusted: {trust_remote_code}")

    for module in ("mtp_mlx.api", "mtp_mlx.base_model"):
        monkeypatch.setattr(f"{module}.load_base", asked)
    monkeypatch.setattr(
        "mtp_mlx.drafters.memory.remember.read_tokenizer", lambda *given: asked(**(given[-1] or {}))
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    model = ["-m", str(save_tiny(tmp_path / "model"))]
    given = [*words.format(data="data.jsonl").split(), *model, "--trust-remote-code"]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 2 and "trusted: True" in result.stderr, result.output


def test_nothing_else_calls_mlx_lms_loader() -> None:
    """Every verb, the server and the examples load models through `mtp_mlx/base_model.py`."""
    loaders = {"mlx_lm.load", "mlx_lm.utils.load", "mlx_lm.utils.load_model", "mlx_lm.utils.load_tokenizer"}
    reads_checkpoints = {"convert/trunk.py", "convert/whole.py"}  # have sentences of their own
    files = [path for room in ("mtp_mlx", "convert", "examples") for path in (ROOT / room).rglob("*.py")]
    wrong = []
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                called = {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                called = {ast.unparse(node)} if isinstance(node, ast.Attribute) else set()
            if called & loaders and name != "mtp_mlx/base_model.py" and name not in reads_checkpoints:
                wrong.append(f"{name}:{node.lineno}")
    assert len(files) > 100 and not wrong
