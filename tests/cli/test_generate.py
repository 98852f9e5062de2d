"""`mtp-mlx generate` on a tiny model: text, statistics, JSON, bars, tints, remembered speed, errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from mtp_mlx.api import GenerationResponse
from mtp_mlx.cli.generation_report import BAR_WIDTH, bars, histograms, legend, styled
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.measure import plain_speed
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import KnowingDrafter, drafting, random_adapter
from tests.tiny import save_tiny, tiny_model

FIELDS = {
    "text": str,
    "tokens": list,
    "prompt_tokens": int,
    "generation_tokens": int,
    "steps": int,
    "tokens_per_step": float,
    "acceptance": list,
    "tok_per_s": float,
    "prompt_tok_per_s": float,
    "layout": str,
    "slots": int,
    "seed": int,
    "temperature": float,
    "lossless": bool,
    "finish_reason": str,
    "stats": dict,
}
COUNT = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    save_tiny(root / "model", "llama", seed=3)
    save_tiny(root / "other", "llama", seed=4)
    model = tiny_model("llama", seed=3)
    adapter = random_adapter(model)
    save_adapter(root / "adapter", adapter, mask_header(adapter.config, "tiny", base_fingerprint(model)))
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Any]:
    """mlx-lm's own responses to the same chat."""
    model, tokenizer = mlx_lm.load(str(folder / "model"))[:2]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "The sky"}], add_generation_prompt=True)
    return list(mlx_lm.stream_generate(model, tokenizer, ids, COUNT))


def run(folder: Path, *args: str, stdin: str | None = None, prompt: str | None = "The sky") -> Result:
    """`mtp-mlx generate` in this process."""
    given = ["--prompt", prompt] if prompt is not None else []
    options = ["-m", str(folder / "model"), "-a", str(folder / "adapter"), "-n", str(COUNT)]
    return CliRunner().invoke(cli.main, ["generate", *options, *given, *args], input=stdin)


def right(expected: list[Any]) -> KnowingDrafter:
    """A drafter that is right about the expected text nine times in ten."""
    return KnowingDrafter([r.token for r in expected], expected[0].prompt_tokens, 0.9, 1)


@pytest.mark.parametrize("layout", ["auto", "linear", "quadratic", "plain"])
def test_json(folder: Path, expected: list[Any], layout: str) -> None:
    with drafting(right(expected)):
        result = run(folder, "--json", "--layout", layout)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    for name, kind in FIELDS.items():
        assert isinstance(report[name], kind), name
    assert report["tokens"] == [r.token for r in expected]
    assert report["text"] == "".join(r.text for r in expected)
    assert report["generation_tokens"] == len(expected) == len(report["tokens"])
    assert report["prompt_tokens"] == expected[0].prompt_tokens
    assert report["finish_reason"] == expected[-1].finish_reason
    assert report["lossless"] is True and report["layout"] == layout
    assert report["tokens_per_step"] == pytest.approx(len(expected) / report["steps"], abs=1e-4)
    if layout in ("linear", "quadratic"):
        assert report["slots"] == 4 and report["steps"] < len(expected) and report["acceptance"][0] > 0.3


def test_text_and_statistics_line(folder: Path, expected: list[Any]) -> None:
    with drafting(right(expected)):
        result = run(folder, "--layout", "quadratic", "--slots", "3")
    assert result.stdout == "".join(r.text for r in expected) + "\n"
    lines = result.stderr.splitlines()
    number = r"\d+(\.\d+)?"
    pattern = (
        rf"{len(expected)} tok · {number} tok/s · {number} tok/step · accept {number}(/{number})* · quadratic 3 · "
        rf"prompt {expected[0].prompt_tokens} tok {number} s · peak {number} GB"
    )
    assert len(lines) == 1 and re.fullmatch(pattern, lines[0]), result.stderr


def test_plain_speed_is_remembered(folder: Path) -> None:
    assert plain_speed.recall(str(folder / "model")) is None
    first = run(folder, "--layout", "plain", "--raw", "-n", "31")
    assert plain_speed.recall(str(folder / "model")) is None, "too short to say anything"
    second = run(folder, "--layout", "plain", "--raw", "-n", "60", prompt="the dog and the fox")
    assert "x plain" not in first.stderr + second.stderr
    speed = plain_speed.recall(str(folder / "model"))
    assert speed and speed > 0 and plain_speed.recall(str(folder / "other")) is None
    third = run(folder, "--layout", "linear", "--json")
    report = json.loads(third.stdout)
    assert report["plain_tok_per_s"] == speed
    assert report["speed_up"] == pytest.approx(report["tok_per_s"] / speed, rel=0.01)
    shown = re.search(rf"\((\d+\.\d\d)x plain {speed:.1f}\)", third.stderr)
    assert shown and float(shown[1]) == pytest.approx(report["speed_up"], abs=0.006)  # both are rounded


def test_plain_speed_survives_a_damaged_file(tmp_path: Path) -> None:
    assert plain_speed.remember("a/b", 10.0, 40) and plain_speed.recall("a/b") == 10
    assert plain_speed.remember("a/b", 12.0, 40) and plain_speed.recall("a/b") == 12
    assert plain_speed.recall("a/b", quantize=4) is None
    assert plain_speed.recall("a/b", context=2000) is None and plain_speed.recall("a/b", context=500) == 12
    assert plain_speed.remember("a/b", 3.0, 40, context=1500) and plain_speed.recall("a/b", context=2000) == 3
    assert plain_speed.recall("a/b") == 12
    file = tmp_path / "cache" / "plain_speed.json"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    for text in ("[1]", "{", '{"a": "b"}', '{"a": []}'):
        file.write_text(text)
        assert plain_speed.recall("a/b") is None
    assert plain_speed.remember("a/b", 11.0, 40) and plain_speed.recall("a/b") == 11
    file.unlink()
    file.mkdir()
    assert not plain_speed.remember("a/b", 11.0, 40)


def test_histogram(folder: Path, expected: list[Any]) -> None:
    with drafting(right(expected)):
        result = run(folder, "--histogram", "--layout", "quadratic")
    lines = result.stderr.splitlines()
    steps, depths = lines.index("tokens per step"), lines.index("acceptance by depth")
    assert all("█" in line or "0%" in line for line in lines[depths + 1 : -1])
    sizes = [(int(line.split()[0]), int(line.split()[-1])) for line in lines[steps + 1 : depths]]
    assert sum(size * count for size, count in sizes) >= len(expected)


def test_trees_show_which_choices_were_accepted() -> None:
    """In the bar charts, and underlined where a likelier draft stood beside the one that was right."""
    tree, stats = DraftTree((7, 8, 9), (-1, -1, 1), (0.5, 0.25, 0.5)), DecodeStats()
    layout = Layout.tree(tree.parents, (0, 0, 0, 2), 4)
    stats.record(layout, [0, 2, 3], ["slots"] * 3, "slots", choices=tree.choices)
    assert stats.to_json()["choices"] == {"1": 1, "2": 1} and "tree 3/0+0+0+2" in stats.layouts
    *_, title, first, second = histograms(stats).splitlines()
    assert title.startswith("accepted drafts by choice") and "50%  1" in first and "50%  1" in second
    stats.choices.clear()
    stats.record(Layout(1, (0, 0)), [0, 1], ["slots"])
    assert stats.choices == {1: 1} and "choice" not in histograms(stats)
    response = GenerationResponse(" sky", 5, mx.zeros((8,)), True, 1, 1, 1.0, 1, 1.0, 0.0, stats, choice=1)
    underline = "\x1b[4m"
    assert underline not in styled(response, True) and underline in styled(replace(response, choice=2), True)


def test_bars_are_exact_to_an_eighth() -> None:
    lines = bars([("1", 1.0, ""), ("2", 0.5, ""), ("3", 1 / (BAR_WIDTH * 8), ""), ("4", 0.0, "")])
    drawn = [line[4 : 4 + BAR_WIDTH].strip() for line in lines]
    assert drawn == ["█" * BAR_WIDTH, "█" * (BAR_WIDTH // 2), "▏", ""]


def test_color(folder: Path, expected: list[Any]) -> None:
    with drafting(right(expected)):
        result = CliRunner().invoke(
            cli.main,
            ["generate", "-m", str(folder / "model"), "-a", str(folder / "adapter"), "-p", "The sky"]
            + ["-n", str(COUNT), "--layout", "quadratic", "--color"],
            color=True,
        )
    tinted = re.compile(r"\x1b\[38;5;\d+m(.*?)\x1b\[0m", re.DOTALL)
    assert len(tinted.findall(result.stdout)) > 5
    assert tinted.sub(r"\1", result.stdout) == "".join(r.text for r in expected) + "\n"
    assert result.stderr.startswith(legend(4))


@pytest.mark.parametrize("source", ["option", "file", "stdin", "dash"])
def test_sources_of_the_prompt(folder: Path, expected: list[Any], tmp_path: Path, source: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("The sky\n")
    result = {
        "option": lambda: run(folder),
        "file": lambda: run(folder, "--prompt-file", str(file), prompt=None),
        "stdin": lambda: run(folder, stdin="The sky\n", prompt=None),
        "dash": lambda: run(folder, stdin="The sky\n", prompt="-"),
    }[source]()
    assert result.stdout == "".join(r.text for r in expected) + "\n", result.stderr


def test_options_reach_the_loop(folder: Path) -> None:
    sampled = ["--json", "--temp", "0.9", "--top-k", "30", "--top-p", "0.95", "--min-p", "0.01"]
    sampled += ["--repetition-penalty", "1.2", "--repetition-context-size", "9", "--seed", "5"]
    texts = {
        json.loads(run(folder, *sampled, "--layout", layout).stdout)["text"] for layout in ("plain", "linear")
    }
    other = json.loads(run(folder, *sampled, "--seed", "6").stdout)["text"]
    assert len(texts) == 1 and other not in texts
    system = json.loads(run(folder, "--json", "--system", "Be kind to the fox.").stdout)
    raw = json.loads(run(folder, "--json", "--raw").stdout)
    assert raw["prompt_tokens"] < 8 < system["prompt_tokens"]
    full = run(folder, "--raw").stdout
    assert (
        run(folder, "--raw", "--stop", full[4:7], "--stop", "zzz").stdout
        == full[: full.find(full[4:7])] + "\n"
    )


def test_fallbacks_are_told_once(folder: Path) -> None:
    result = run(folder, "--layout", "plain", "--lookup")
    assert result.stderr.count("note: no lookup") == 1


def test_drafter(folder: Path, expected: list[Any]) -> None:
    """The text drafts alone, with any model, or with the adapter; names that do not go end in exit code 2."""
    for options in [("lookup",), ("lookup", "-a", "none", "--slots", "5"), ("slots,lookup",)]:
        result = run(folder, "--layout", "linear", "--json", "--drafter", *options)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["tokens"] == [r.token for r in expected]
        drafters = set(found["stats"]["submitted_by"])
        assert "slots" in drafters if "slots" in options[0] else drafters <= {"lookup"}
    for name, message in [
        ("heads", "needs MTP heads: name them with --heads, or their folder with --adapter"),
        ("x", "unknown drafter 'x'"),
    ]:
        result = run(folder, "--drafter", name)
        assert result.exit_code == 2 and message in result.stderr
    result = run(folder, "--drafter", "lookup", "--lookup")
    assert result.exit_code == 2 and "leave --lookup out" in result.stderr


def test_ctrl_c_keeps_the_text(folder: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import mtp_mlx.api

    original = mtp_mlx.api.stream_generate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        steps = original(*args, **kwargs)
        for _ in range(5):
            yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(mtp_mlx.api, "stream_generate", interrupted)
    result = run(folder, "--layout", "quadratic")
    assert result.exit_code == 130
    assert result.stdout == "".join(r.text for r in expected[:5]) + "\n"
    assert result.stderr.startswith("5 tok · ") and result.stderr.endswith(" · stopped\n")
    assert json.loads(run(folder, "--json").stdout)["finish_reason"] == "interrupted"


def test_a_closed_pipe_is_quiet(folder: Path) -> None:
    code = "import sys; from mtp_mlx.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "generate", "-m", str(folder / "model"), "-a", "none", "-p", "a"]
    process = subprocess.Popen(
        [*command, "-n", "400"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    stderr = process.stderr.read().decode()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in stderr and "Broken pipe" not in stderr and "Error" not in stderr


ERRORS: list[tuple[list[str], str]] = [
    (["-m", "~nosuchuser/x"], "without a home folder"),
    (["-m", "nowhere"], "no model 'nowhere'"),
    (["--prompt", "  "], "the prompt is empty"),
    (["--prompt", "", "--raw"], "the prompt is empty"),
    (["--prompt-file", "x", "--prompt", "y"], "give one of them"),
    (["--raw", "--system", "x"], "give only one of them"),
    (["--layout", "cubic"], "'cubic' is not one of"),
    (["--slots", "9"], "drafts per step must be 1 to 4"),
    (["--adapter", "none", "--layout", "linear"], "needs an adapter"),
    (["--adapter", "nowhere"], "nowhere is not an adapter folder"),
    (["--temp", "-1"], "--temp must be at least 0"),
    (["--max-tokens", "0"], "--max-tokens must be at least 1"),
    (["--quantize", "4"], "--quantize is for the embedded model only"),
]


@pytest.mark.parametrize(
    ("args", "message"), ERRORS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_errors_are_one_sentence(folder: Path, args: list[str], message: str) -> None:
    result = run(folder, *args)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == "", result.output


@pytest.mark.parametrize("options", [[], ["--raw"], ["-p", "-"]], ids=" ".join)
def test_a_prompt_that_is_no_text(folder: Path, options: list[str]) -> None:
    result = CliRunner().invoke(cli.main, ["generate", "-m", str(folder / "model"), *options], input=b"a\xff")
    assert result.exit_code == 2 and "stdin is not UTF-8 at byte 1" in result.stderr, result.output
    result = run(folder, prompt="a\udcff")
    assert result.exit_code == 2 and "the prompt is not UTF-8" in result.stderr, result.output


def test_exact_reaches_the_model(tmp_path: Path) -> None:
    """gemma2 cannot be exact: asked to be, it says so; otherwise it writes."""
    save_tiny(tmp_path / "gemma2", "gemma2", seed=3)
    arguments = [
        "-m",
        str(tmp_path / "gemma2"),
        "--adapter",
        "none",
        "--layout",
        "plain",
        "--max-tokens",
        "3",
    ]
    for verb in (["generate", "--prompt", "the"], ["bench", "--limit", "1"]):
        refused = CliRunner().invoke(cli.main, [*verb, *arguments, "--exact"])
        assert refused.exit_code == 2 and "exact decoding does not support" in refused.stderr, refused.output
        assert CliRunner().invoke(cli.main, [*verb, *arguments]).exit_code == 0


def test_wrong_adapter_and_missing_prompt_file(folder: Path) -> None:
    result = run(folder, "-m", str(folder / "other"))
    assert result.exit_code == 2 and result.stderr.count("fingerprint") == 2
    result = run(folder, "--prompt-file", str(folder / "nothing.txt"), prompt=None)
    assert result.exit_code == 2 and "nothing.txt" in result.stderr
