"""Proves that generation_config.json is obeyed where texts end, and that its sampling is offered and never imposed:
in generate, chat, the server and Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from click.testing import CliRunner, Result

from mtp_mlx import SamplingConfig, load, stream_generate
from mtp_mlx.cli import main
from mtp_mlx.recommended import recommended_sampling
from tests.tiny import never_end, save_tiny

QWEN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [151645]}
SAMPLED = SamplingConfig(temperature=0.6, top_k=20, top_p=0.95)
NOTE = "greedy; the model recommends temperature 0.6, top_k 20, top_p 0.95, which --sampling model uses"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny(tmp_path_factory.mktemp("model") / "m", "llama", seed=3)
    never_end(path)
    (path / "generation_config.json").write_text(json.dumps(QWEN))
    return path


def run(verb: str, folder: Path, *more: str, **how: Any) -> Result:
    result = CliRunner().invoke(main, [verb, "-m", str(folder), "-a", "none", *more], **how)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (QWEN, SAMPLED),
        ({"do_sample": True}, SamplingConfig(temperature=1.0)),
        (
            {"do_sample": True, "top_k": 64, "top_p": 0.95},
            SamplingConfig(temperature=1.0, top_k=64, top_p=0.95),
        ),
        ({"temperature": 0.15}, SamplingConfig(temperature=0.15)),
        ({"do_sample": True, "min_p": 0.1, "temperature": 1}, SamplingConfig(temperature=1, min_p=0.1)),
        ({"do_sample": False, "temperature": 0.6}, None),
        ({"repetition_penalty": 1.1}, SamplingConfig(repetition_penalty=1.1)),
        ({"bos_token_id": 1, "max_new_tokens": 20, "top_k": None}, None),
    ],
)
def test_what_the_file_recommends(given: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert recommended_sampling(tmp_path) == expected


@pytest.mark.parametrize("given", [{"temperature": "hot"}, {"top_p": 7}, {"temperature": True}])
def test_a_recommendation_without_sense_is_said_and_left(
    given: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert recommended_sampling(tmp_path) is None  # no file
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert recommended_sampling(tmp_path) is None
    assert "recommends no sampling that can be used" in caplog.text


def test_texts_end_at_its_tokens(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama", seed=3)
    never_end(folder)
    model, tokenizer = load(str(folder), None)
    plain = [r.token for r in stream_generate(model, tokenizer, "the sky", 12, layout="plain")]
    end = next(i for i, token in enumerate(plain) if plain.index(token) == i and i > 2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [10**6, plain[end]]}))
    model, tokenizer = load(str(folder), None)
    for layout in ("plain", "linear"):
        given = {"layout": layout, "drafter": "lookup" if layout == "linear" else None}
        found = list(stream_generate(model, tokenizer, "the sky", 12, **given))
        assert [r.token for r in found] == plain[: end + 1] and found[-1].finish_reason == "stop"
    theirs = list(mlx_lm.stream_generate(*mlx_lm.load(str(folder)), "the sky", 12))
    assert [r.token for r in theirs] == plain[: end + 1]


def test_generate(folder: Path) -> None:
    asked = ["-p", "the sky", "--raw", "-n", "16", "--json", "--seed", "4"]
    greedy = run("generate", folder, *asked)
    assert greedy.stderr.splitlines()[0] == f"note: {NOTE}"
    assert json.loads(greedy.stdout)["temperature"] == 0
    sampled = run("generate", folder, *asked, "--sampling", "model")
    assert "sampling as the model recommends: temperature 0.6" in sampled.stderr.splitlines()[0]
    found = json.loads(sampled.stdout)
    assert (found["temperature"], found["settings"]["top_k"], found["settings"]["top_p"]) == (0.6, 20, 0.95)
    by_hand = ["--temp", "0.6", "--top-k", "20", "--top-p", "0.95"]
    own = run("generate", folder, *asked, *by_hand)
    assert json.loads(own.stdout)["tokens"] == found["tokens"] != json.loads(greedy.stdout)["tokens"]
    assert "recommends" not in own.stderr  # who chooses needs no advice
    part = run("generate", folder, *asked, "--sampling", "model", "--temp", "0", "--top-k", "0")
    settings = json.loads(part.stdout)["settings"]
    assert json.loads(part.stdout)["tokens"] == json.loads(greedy.stdout)["tokens"]
    assert (settings["top_k"], settings["top_p"]) == (0, 0.95)


def test_a_model_that_recommends_nothing(tmp_path: Path) -> None:
    bare = save_tiny(tmp_path / "m", "llama", seed=3)
    asked = ["-p", "the sky", "--raw", "-n", "4"]
    assert "recommends" not in run("generate", bare, *asked).stderr
    wanted = run("generate", bare, *asked, "--sampling", "model")
    assert "note: the model recommends no sampling, so --sampling model changes nothing" in wanted.stderr


def test_chat(folder: Path) -> None:
    greedy = run("chat", folder, "-n", "16", input="the sky\n")
    assert greedy.stderr.splitlines()[0] == f"note: {NOTE}"
    sampled = run("chat", folder, "-n", "16", "--seed", "4", "--sampling", "model", input="the sky\n")
    by_hand = ["--temp", "0.6", "--top-k", "20", "--top-p", "0.95"]
    own = run("chat", folder, "-n", "16", "--seed", "4", *by_hand, input="the sky\n")
    assert sampled.stdout == own.stdout != greedy.stdout


def test_python(folder: Path) -> None:
    model, _ = load(str(folder), None)
    assert model.recommended_sampling == SAMPLED


def test_requests(folder: Path) -> None:
    """The server's default; fields of a request go before."""
    pytest.importorskip("starlette")
    from mtp_mlx.cli.serve import ServeSettings, application
    from mtp_mlx.serve.fields import Fields

    def used(settings: dict[str, Any], body: dict[str, Any]) -> SamplingConfig:
        prompts = application(ServeSettings(model=str(folder), adapter="none", **settings), None)._prompts
        return prompts.request([1, 2], Fields({"seed": 0, **body}, ()), None, ()).sampling

    assert used({}, {}) == SamplingConfig()
    assert used({"sampling": "model"}, {}) == SAMPLED
    changed = used({"sampling": "model", "temp": 0.3}, {"top_k": 5, "repetition_penalty": 1.1})
    assert changed == SamplingConfig(temperature=0.3, top_k=5, top_p=0.95, repetition_penalty=1.1)
