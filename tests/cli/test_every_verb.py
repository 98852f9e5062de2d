"""Proves that every verb runs every kind of drafter in every layout, dense and quantised, with cold and warm caches.

The drafters are the folders in `tests/adapters`, one of each kind that can be written, a draft model, the text
itself, remembered texts, and none. Texts must be those of plain decoding.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from click.testing import CliRunner, Result
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from mtp_mlx.api import chat_prompt
from mtp_mlx.cli import main
from mtp_mlx.cli.serve import ServeSettings, application
from mtp_mlx.planning import calibrate
from mtp_mlx.serve.request import Event, GenerationRequest, Piece
from tests.adapters.test_written_before import BASE, HERE, KINDS
from tests.tiny import never_end, save_tiny

BASES = ["dense", "quantised"]
DRAFTERS = ["none", "lookup", "memory", "draft-model", *KINDS]
LAYOUTS = ["auto", "auto", "linear", "quadratic", "tree", "plain"]  # the first with a cold cache
COUNT = 18  # more than the few tokens for which nothing is measured
PROMPT = "the fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, dense and with all that can be at 4 bits, a draft model, and a file of prompts."""
    root = tmp_path_factory.mktemp("verbs")
    for base in (*BASES, "draft-model"):
        save_tiny(root / base, "llama", **BASE, **({"num_hidden_layers": 1} if base == "draft-model" else {}))
    _quantise(root / "quantised")
    for base in BASES:  # training needs an end of the text; texts of one length are easier to compare
        shutil.copytree(root / base, root / f"{base}, ending")
        never_end(root / base)
    never_end(root / "draft-model")
    rows = [{"prompt": PROMPT, "category": "a"}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "said.txt").write_text("the fox and the dog and the fox " * 20)
    for base in BASES:
        words = [str(root / "said.txt"), "-m", str(root / base), "-o", str(root / f"{base}.mem")]
        assert run("remember", *words).exit_code == 0
    return root


def _quantise(folder: Path) -> None:
    """At 4 bits wherever a row is made of groups."""
    model: Any = mlx_lm.load(str(folder))[0]
    groups: dict[str, Any] = {"group_size": 32, "bits": 4}
    chosen: dict[str, Any] = {}

    def in_groups(path: str, module: nn.Module) -> bool:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        chosen[path] = groups if fits else False
        return fits

    nn.quantize(model, **groups, class_predicate=in_groups)
    assert any(chosen.values()) and not all(chosen.values())
    weights: Any = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": groups}))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "BUDGET", 0.2)
    return tmp_path / "cache"


def empty(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process with an empty cache."""
    shutil.rmtree(cache, ignore_errors=True)
    monkeypatch.setattr(calibrate, "_measured", {})
    monkeypatch.setattr(calibrate, "_gone_on", set())
    monkeypatch.setattr(calibrate, "_saved_up", set())


def options(folder: Path, base: str, drafter: str) -> list[str]:
    given = {
        "none": ["-a", "none"],
        "lookup": ["-a", "none", "--lookup"],
        "memory": ["-a", "none", "--memory", str(folder / f"{base}.mem")],
        "draft-model": ["--draft-model", str(folder / "draft-model")],
    }
    return ["-m", str(folder / base), *given.get(drafter, ["-a", str(HERE / drafter)])]


def run(verb: str, *words: str, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(main, [verb, *words], input=stdin)
    assert result.exit_code in (0, 2) and "Traceback" not in result.output, (verb, words, result)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def has(drafter: str, layout: str) -> bool:
    """Whether a drafter has a layout."""
    slots = drafter in ("conf-adapt", "mask-tokens", "ptp-c", "ptp-o")
    return slots if layout == "quadratic" else layout != "linear" or drafter != "none"


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("base", BASES)
class TestEveryVerb:
    def test_generate_and_chat(
        self, folder: Path, cache: Path, base: str, drafter: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = [*options(folder, base, drafter), "-n", str(COUNT)]
        plain = ["-m", str(folder / base), "-a", "none", "-n", str(COUNT), "--layout", "plain"]
        expected = run("generate", *plain, "-p", PROMPT).stdout
        for verb, more, stdin in [("generate", ["-p", PROMPT], None), ("chat", [], f"{PROMPT}\n")]:
            empty(cache, monkeypatch)
            for layout in LAYOUTS:
                result = run(verb, *given, *more, "--layout", layout, stdin=stdin)
                assert (result.exit_code == 0) == has(drafter, layout), (verb, layout, result.output)
                if result.exit_code == 0:
                    assert result.stdout == expected, (verb, layout)
                else:
                    assert result.stderr.startswith("Error: layout"), result.stderr
            assert len(list((cache / "costs").iterdir())) == 1, verb

    def test_bench_eval_and_tune(
        self, folder: Path, cache: Path, base: str, drafter: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a cold and a warm cache; texts that differ from mlx-lm's would be counted."""
        given, prompts = [*options(folder, base, drafter), "-n", str(COUNT)], str(folder / "prompts.jsonl")
        own = [layout for layout in dict.fromkeys(LAYOUTS) if has(drafter, layout)]
        lanes = [word for layout in own for word in ("--layout", layout)]
        few = [word for layout in own if layout not in ("tree", "plain") for word in ("--layout", layout)]
        for state in ("cold", "warm"):
            for verb, more in [("bench", ["-p", prompts, *lanes]), ("eval", ["-q", prompts, *few])]:
                if state == "cold":
                    empty(cache, monkeypatch)
                if verb == "eval" and drafter in ("lookup", "memory", "draft-model"):
                    continue  # eval measures adapters
                result = run(verb, *given, *more, "--json")
                assert result.exit_code == 0, (verb, result.output)
                report = json.loads(result.stdout)
                rows = report["rows"]
                assert rows and not any(row.get("refused") for row in rows), (verb, rows)
            if drafter != "lookup":
                result = run("tune", *given[:-1], "4", "-p", prompts, "--json")
                assert result.exit_code == 0 and json.loads(result.stdout)["kept_in"], result.output

    def test_serve(
        self, folder: Path, cache: Path, base: str, drafter: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, tokenizer = mlx_lm.load(str(folder / base))[:2]
        ids = chat_prompt(tokenizer, PROMPT)
        expected = [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=8)]
        empty(cache, monkeypatch)
        for layout in LAYOUTS:
            if has(drafter, layout):
                assert served(settings(folder, base, drafter, layout), ids) == expected, layout


def settings(folder: Path, base: str, drafter: str, layout: Any) -> ServeSettings:
    """Those of `serve`, as `options` has them for other verbs."""
    given: dict[str, Any] = {
        "none": {"adapter": "none"},
        "lookup": {"adapter": "none", "lookup": True},
        "memory": {"adapter": "none", "memory": str(folder / f"{base}.mem")},
        "draft-model": {"draft_model": str(folder / "draft-model")},
    }
    own = given.get(drafter, {"adapter": str(HERE / drafter)})
    return ServeSettings(model=str(folder / base), layout=layout, **own)


def served(settings: ServeSettings, prompt: list[int]) -> list[int]:
    """Ids of an answer of eight tokens."""
    found: list[int] = []
    events: list[Event] = []
    ended = threading.Event()

    def deliver(event: Event) -> None:
        events.append(event)
        if not isinstance(event, Piece) or event.summary is not None:
            ended.set()

    engine = application(settings, None).engine
    engine.start()
    try:
        engine.submit(GenerationRequest(prompt, 8, top_logprobs=0), deliver)
        assert ended.wait(60)
    finally:
        engine.stop()
    for event in events:
        assert isinstance(event, Piece) and event.logprob is not None, event
        found.append(event.logprob.token)
    return found


@pytest.mark.parametrize("base", BASES)
def test_distill(folder: Path, cache: Path, base: str, tmp_path: Path) -> None:
    """It needs no costs, and asks for none."""
    for state in ("cold", "warm"):
        out = tmp_path / f"{state}.jsonl"
        words = ["-m", str(folder / base), "-p", str(folder / "prompts.jsonl"), "-o", str(out)]
        assert run("distill", *words, "--max-tokens", "8").exit_code == 0
        assert len(json.loads(out.read_text())["response_tokens"]) == 8
    assert not (cache / "costs").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_plan(cache: Path, kind: str) -> None:
    for _ in ("cold", "warm"):
        result = run("plan", "-a", str(HERE / kind))
        assert result.exit_code == 0 or "acceptance" in result.stderr, result.output
    assert not cache.exists()


@pytest.mark.parametrize("method", ["mask-tokens", "conf-adapt", "mtp-heads", "ptp"])
@pytest.mark.parametrize("base", BASES)
def test_train(folder: Path, cache: Path, base: str, method: str, tmp_path: Path) -> None:
    """What it trains then drafts, with costs that nobody has measured yet."""
    rows = [{"prompt": PROMPT, "response": "the dog and the fox and the dog " * 3}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "-m",
        str(folder / f"{base}, ending"),
        "-d",
        str(tmp_path / "rows.jsonl"),
        "-o",
        str(tmp_path / "out"),
    ]
    result = run("train", method, *words, "--steps", "1")
    assert result.exit_code == 0, result.output
    assert not (cache / "costs").exists()
    plain = run(
        "generate", "-m", str(folder / base), "-a", "none", "--layout", "plain", "-p", PROMPT, "-n", "18"
    )
    result = run("generate", "-m", str(folder / base), "-a", str(tmp_path / "out"), "-p", PROMPT, "-n", "18")
    assert result.exit_code == 0 and result.stdout == plain.stdout, result.output
