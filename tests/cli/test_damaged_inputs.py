"""Proves that whatever reads a damaged input says so in one sentence, with exit code 2, and leaves nothing behind."""

from __future__ import annotations

import io
import queue
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlx_lm.models.cache import load_prompt_cache

import mtp_mlx.cli.serve as serve
from examples import finetune_notes
from examples.chat_app.engine import ChatEngine, Event
from mtp_mlx.api import generate, load
from mtp_mlx.cli import main
from mtp_mlx.errors import MTPError
from tests.cli.damage import DAMAGES, Damage
from tests.cli.damage_edits import another, bench, cache_of
from tests.cli.damage_gguf import GGUF_DAMAGES, SPLIT, written


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and what it printed."""

    code: int
    text: str


Verb = Callable[[Path, Damage], Outcome]


def cli(*words: str) -> Verb:
    """A verb of the command line; {root}, {adapter}, {damaged} and {gguf} are filled in."""

    def run(root: Path, damage: Damage) -> Outcome:
        adapter = str(root / "adapter") if damage.what == "adapter" else "none"
        damaged = root / ("adapter" if damage.what == "adapter" else "model")
        places = {"root": root, "adapter": adapter, "damaged": damaged, "gguf": root / damage.given}
        filled = [word.format(**places) for word in words]
        result = CliRunner().invoke(main, [*filled, *damage.options], input="the\n")
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        if words[0] == "info" and "usable: no: " in result.stdout:  # info shows what is wrong
            return Outcome(2, f"Error: {result.stdout.partition('usable: no: ')[2].splitlines()[0]}")
        return Outcome(result.exit_code, result.stderr)

    return run


def chat_app(root: Path, damage: Damage) -> Outcome:
    """The chat window's engine, loading a model."""
    events: queue.Queue[Event] = queue.Queue()
    engine = ChatEngine(events.put)
    engine.load(str(root / "model"), str(root / "adapter") if damage.what == "adapter" else None)
    event = events.get(timeout=60)
    engine.close()
    return Outcome(2 if event.kind == "failed" else 0, f"Error: {event.text}\n")


def prompt_cache(root: Path, _: Damage) -> Outcome:
    """The library, going on from a prompt cache that was saved with mlx-lm."""
    model, tokenizer = load(str(root / "model"), None)
    try:
        generate(model, tokenizer, "the", 2, prompt_cache=load_prompt_cache(str(root / "cache.safetensors")))
    except MTPError as error:
        return Outcome(2, f"Error: {error}\n")
    return Outcome(0, "")


def notes(root: Path, _: Damage) -> Outcome:
    """The example that trains on a folder of notes."""
    folder, stderr = root.parent / "notes", io.StringIO()
    folder.mkdir(exist_ok=True)
    for name in "abc":
        (folder / f"{name}.md").write_text(f"The quick brown fox {name} jumps over the lazy dog. " * 4)
    words = ["finetune_notes", str(folder), "--model", str(root / "model"), "--out", str(folder / "out")]
    try:
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(stderr):
            patch.setattr(sys, "argv", [*words, "--steps", "1", "--max-tokens", "2"])
            finetune_notes.main()
    except SystemExit as stopped:
        return Outcome(int(stopped.code or 0), stderr.getvalue())
    return Outcome(0, stderr.getvalue())


MODEL = ("-m", "{root}/model", "-a", "{adapter}")
TRAIN = ("train", "-m", "{root}/model", "-d", "{root}/rows.jsonl", "-o", "{root}/out", "--steps", "1")
VERBS: dict[str, Verb] = {
    "generate": cli("generate", *MODEL, "-p", "the", "-n", "2"),
    "chat": cli("chat", *MODEL, "-n", "2"),
    "serve": cli("serve", *MODEL, "--port", "0"),
    "bench": cli("bench", *MODEL, "-n", "2", "--limit", "1"),
    "eval": cli("eval", *MODEL, "-n", "2", "--limit", "1"),
    "tune": cli("tune", *MODEL, "-n", "2"),
    "train": cli(*TRAIN, "--slots", "2", "--rank", "2"),
    "train from": cli(*TRAIN, "--slots", "2", "--rank", "2", "--start-from", "{adapter}"),
    "distill": cli("distill", "-m", "{root}/model", "-p", "{root}/rows.jsonl", "-o", "{root}/new/out.jsonl"),
    "info": cli("info", "{damaged}"),
    "plan": cli("plan", "-a", "{root}/adapter"),
    "convert": cli("convert", "{gguf}", "{root}/new/out"),
    "convert to 4 bits": cli("convert", "{gguf}", "{root}/new/out", "--quantize", "4", "--group-size", "32"),
    "convert plan": cli("convert", "{gguf}", "--dry-run"),
    "info of a file": cli("info", "{gguf}"),
    "push": cli("push", "{root}/adapter", "someone/adapter"),
    "draft model": cli(
        "generate", "-m", "{root}/../good", "--draft-model", "{root}/model", "-p", "the", "-n", "2"
    ),
    "prompt cache": prompt_cache,
    "notes": notes,
    "chat app": chat_app,
}


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench(tmp_path_factory.mktemp("undamaged"))


@pytest.fixture
def root(undamaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an undamaged model and rows; caches lie elsewhere, and `serve` does not listen."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(undamaged.parent / "cache"))
    monkeypatch.setattr(serve, "run", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undamaged / "model", tmp_path / "good")
    shutil.copytree(undamaged, tmp_path / "root")
    return tmp_path / "root"


def below(folder: Path) -> list[str]:
    """Everything in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("damage", [*DAMAGES, *GGUF_DAMAGES], ids=lambda damage: damage.name)
def test_a_damaged_input_is_one_sentence(damage: Damage, root: Path) -> None:
    names = {
        "rows": "rows.jsonl",
        "adapter": "adapter",
        "gguf": damage.given,
        "cache": "cache.safetensors",
    }
    place = names.get(damage.what, "model")
    damage.edit(root / place)
    before = below(root)
    for verb in damage.readers:
        outcome = VERBS[verb](root, damage)
        _, found, message = outcome.text.partition("Error: ")
        assert outcome.code == 2 and found, f"{verb}: {outcome}"
        assert damage.says in message and len(message.strip().splitlines()) == 1, f"{verb}: {message}"
        assert below(root) == before, f"{verb} left something behind"


@pytest.mark.parametrize("given", ["model.gguf", SPLIT.format(1)])
def test_undamaged_gguf_files_are_converted(root: Path, given: str) -> None:
    """The files that are damaged above are good before."""
    nothing = Damage("nothing", "gguf", written(), "", given=given)
    nothing.edit(root / given)
    for verb in (*nothing.readers, "info of a file"):
        outcome = VERBS[verb](root, nothing)
        assert outcome.code == 0, f"{verb}: {outcome}"
        shutil.rmtree(root / "new", ignore_errors=True)


def test_undamaged_caches_are_used(root: Path) -> None:
    """The model's own, of plain and of quantised keys and values that fit."""
    own = Damage("nothing", "cache", cache_of("qwen3"), "")
    own.edit(root / "cache.safetensors")
    assert VERBS["prompt cache"](root, own).code == 0
    fits = Damage("nothing", "options", another("qwen3", head_dim=64), "", options=("--kv-bits", "4"))
    fits.edit(root / "model")
    for verb in fits.readers:
        assert VERBS[verb](root, fits).code == 0, verb


def test_undamaged_it_works(root: Path) -> None:
    """What these tests damage is good before, and every verb that reads a model gets through with it."""
    nothing = Damage("nothing", "model", lambda _: None, "")
    for verb in nothing.readers:
        outcome = VERBS[verb](root, nothing)
        assert outcome.code == 0, f"{verb}: {outcome}"
