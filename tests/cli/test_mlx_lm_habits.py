"""Options that users of mlx-lm know do here what they do there."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

import mtp_mlx
from mtp_mlx.cli import main
from tests.test_docs import blocks, commands
from tests.tiny import never_end, save_tiny

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if not loop.last or not continue_final_message %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ mood or '' }}"
)
N = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny(tmp_path_factory.mktemp("model") / "m", "llama", seed=3)
    never_end(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def ours(folder: Path, *more: str) -> list[int]:
    arguments = ["generate", "-m", str(folder), "-a", "none", "-n", str(N), "--json", *more]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["tokens"]


@lru_cache
def bare(folder: Path) -> tuple[Any, Any]:
    return mlx_lm.load(str(folder))[:2]


def theirs(folder: Path, prompt: str | list[int], n: int = N, **options: Any) -> list[int]:
    model, tokenizer = bare(folder)
    ids = tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
    return [r.token for r in mlx_lm.stream_generate(model, tokenizer, ids, n, **options)]


def test_the_answer_is_begun(folder: Path) -> None:
    assert ours(folder, "-p", "the sky", "--prefill-response", "it is") == theirs(
        folder, "<|user|>the sky;<|assistant|>it is"
    )


def test_variables_of_the_template_and_the_system_prompt(folder: Path) -> None:
    options = ["--chat-template-config", '{"mood": "sad"}', "--system-prompt", "be"]
    found = ours(folder, "-p", "the sky", *options)
    assert found == theirs(folder, "<|system|>be;<|user|>the sky;<|assistant|>sad")
    assert ours(folder, "-p", "the sky", "--ignore-chat-template") != found


def test_biases(folder: Path) -> None:
    plain = ours(folder, "-p", "the sky", "--raw")
    found = ours(folder, "-p", "the sky", "--raw", "--logit-bias", f"{plain[0]}=-50", "--logit-bias", "7=3")
    _, tokenizer = mlx_lm.load(str(folder))
    processors = make_logits_processors({plain[0]: -50.0, 7: 3.0})
    assert found == theirs(folder, tokenizer.encode("the sky"), logits_processors=processors) != plain


def test_further_ends(folder: Path) -> None:
    plain = ours(folder, "-p", "the sky")
    last = next(i for i, token in enumerate(plain) if plain.index(token) == i and i > 1)
    assert ours(folder, "-p", "the sky", "--extra-eos-token", str(plain[last])) == plain[: last + 1]


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a kind that makes no caches of its own, which mlx-lm's max_kv_size has an effect on."""
    path = save_tiny(tmp_path_factory.mktemp("limited") / "m", "qwen3", seed=3)
    never_end(path)
    return path


@pytest.mark.parametrize(
    "how",
    [
        ["--layout", "plain"],
        ["--layout", "linear", "--drafter", "lookup"],
        ["--layout", "tree", "--rows", "12"],
        ["--layout", "plain", "--prefill-step-size", "7"],
    ],
)
def test_a_cache_of_limited_size(limited: Path, how: list[str]) -> None:
    """Prompts shorter and longer than the cache; texts that fill it; drafts that are taken back in it."""
    more = {"prefill_step_size": 7} if "--prefill-step-size" in how else {}
    apart = 0
    for size in (9, 24):
        for prompt in ("a", "the dog " * 4, "the sky and the dog and the fox " * 3):
            found = ours(limited, "-p", prompt, "--raw", "--max-kv-size", str(size), "-n", "40", *how)
            assert found == theirs(limited, prompt, n=40, max_kv_size=size, **more)
            apart += found != theirs(limited, prompt, n=40)
    assert apart >= 4, "the test needs texts that the limit changes"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            ["--kv-bits", "8"],
            "cannot be quantised (nor can it in mlx-lm): leave --kv-bits or --max-kv-size out",
        ),
        (
            ["--exact"],
            "exact decoding is not possible with a cache of limited size: leave --max-kv-size or --exact",
        ),
    ],
)
def test_what_a_limited_cache_cannot_be(limited: Path, option: list[str], message: str) -> None:
    arguments = ["generate", "-m", str(limited), "-a", "none", "-p", "a", "--max-kv-size", "9", *option]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and message in result.output, result.output


def test_a_limited_cache_in_a_file(limited: Path, tmp_path: Path) -> None:
    file, prompt = tmp_path / "kept.safetensors", "the sky and the dog " * 4
    made = ["cache-prompt", "-m", str(limited), "-p", prompt, "--raw", "-o", str(file), "--max-kv-size", "12"]
    assert CliRunner().invoke(main, made, catch_exceptions=False).exit_code == 0
    expected = theirs(limited, " cold", prompt_cache=load_prompt_cache(str(file)))
    assert ours(limited, "-p", " cold", "--raw", "--prompt-cache-file", str(file)) == expected


def test_a_model_that_makes_its_own_caches_says_that_a_limit_has_no_effect(folder: Path) -> None:
    arguments = ["generate", "-m", str(folder), "-a", "none", "-p", "the sky", "--raw", "-n", str(N)]
    result = CliRunner().invoke(main, [*arguments, "--max-kv-size", "6", "--json"], catch_exceptions=False)
    assert "note: max_kv_size has no effect" in result.stderr
    assert json.loads(result.stdout)["tokens"] == theirs(folder, "the sky", max_kv_size=6)


def test_the_model_is_that_of_the_cache_unless_one_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm's README: cache_prompt with --prompt-cache-file, then generate without --model."""
    monkeypatch.chdir(tmp_path)
    made = ["cache-prompt", "-m", str(folder), "--prompt", "-", "--prompt-cache-file", "kept.safetensors"]
    assert CliRunner().invoke(main, made, input="the sky was grey", catch_exceptions=False).exit_code == 0
    asked = ["generate", "--prompt-cache-file", "kept.safetensors", "-p", " cold", "-n", str(N), "--json"]
    found = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    expected = ours(folder, "-p", " cold", "--prompt-cache-file", "kept.safetensors")
    assert json.loads(found.stdout)["tokens"] == expected


def test_chat_and_serve_take_mlx_lm_s_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("starlette")
    from mtp_mlx.cli.serve import ServeSettings, application

    says = ["chat", "-m", str(folder), "-a", "none", "-n", "8", "--temp", "0.9", "--seed", "2"]
    plain = CliRunner().invoke(main, says, input="the sky\n", catch_exceptions=False).stdout
    for more in (["--system-prompt", "be"], ["--xtc-probability", "1", "--xtc-threshold", "0.01"]):
        other = CliRunner().invoke(main, [*says, *more], input="the sky\n", catch_exceptions=False)
        assert other.exit_code == 0 and other.stdout != plain, other.output
    read: list[int] = []

    def listened(*_: Any, prefill_step_size: int, **__: Any) -> Any:
        read.append(prefill_step_size)
        yield from ()

    monkeypatch.setattr("mtp_mlx.conversation.stream_generate", listened)
    CliRunner().invoke(main, [*says, "--prefill-step-size", "3"], input="the sky\n", catch_exceptions=False)
    assert read == [3]
    given = {"temp": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
    settings = ServeSettings(model=str(folder), adapter="none", prefill_step_size=7, **given)
    made = application(settings, None)
    used = made._prompts.limits.sampling
    assert (used.temperature, used.top_p, used.top_k, used.min_p) == tuple(given.values())
    assert made.engine.settings.decode.prefill_step_size == 7


def test_calls_of_mlx_lm_s_readme(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One import is another: load by its argument's name, ids of a chat, verbose, a cache made by mlx-lm."""
    texts = []
    for library in (mlx_lm, mtp_mlx):
        model, tokenizer = library.load(path_or_hf_repo=str(folder))[:2]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "sky"}], add_generation_prompt=True
        )
        cache = make_prompt_cache(model)
        for _ in range(2):  # the second goes on behind the first
            said = library.generate(
                model, tokenizer, prompt=prompt, max_tokens=6, prompt_cache=cache, verbose=True
            )
        shown = capsys.readouterr().out
        assert said in shown and "Generation: 6 tokens" in shown and shown.count("=" * 10) == 4
        texts.append(said)
    assert texts[0] == texts[1] != ""
    with pytest.raises(mtp_mlx.MTPError, match="give `verbose` by its name"):
        mtp_mlx.generate(model, tokenizer, prompt, True)


def test_where_a_name_clashes_ours_stays_and_the_help_says_so() -> None:
    """-m is the number of tokens in mlx-lm."""
    for verb in ("generate", "chat"):
        shown = " ".join(CliRunner().invoke(main, [verb, "--help"]).stdout.split())
        assert "-n, --max-tokens" in shown and "(mlx-lm's -m); -1 = no limit" in shown
    result = CliRunner().invoke(main, ["generate", "-m", "200", "-p", "the sky"])
    assert result.exit_code == 2
    assert (
        "no model '200': --model names a model here, and --max-tokens is the number of tokens"
        in result.stderr
    )


def test_the_page_has_the_commands_of_mlx_lm_s_readme() -> None:
    """Each that generates, chats, serves or caches, with its options; `tests/test_docs.py` runs the page's."""
    readme = importlib.metadata.metadata("mlx-lm").get_payload()
    lines = re.sub(r"\\\n\s*", " ", str(readme)).splitlines()
    asked = [line.rpartition("| ")[2] for line in lines if re.match(r"(cat \S+ \| )?mlx_lm\.[a-z_]+ ?", line)]
    page = Path(__file__).parents[2] / "docs" / "from-mlx-lm.md"
    ours = [line for block in blocks(page) for line in commands(block)]
    like = {"generate": "generate", "chat": "chat", "cache_prompt": "cache-prompt", "server": "serve"}
    found = 0
    for line in asked:
        verb, options = re.match(r"mlx_lm\.(\w+)", line)[1], set(re.findall(r"(?<= )--?[a-z-]+", line))
        if verb in like and not options & {"-h", "--help"}:
            known = [re.findall(r"(?<= )--[a-z-]+", mine) for mine in ours if mine.split()[1] == like[verb]]
            assert any(options <= set(mine) for mine in known), line
            found += 1
        elif verb in like:
            assert CliRunner().invoke(main, [like[verb], *options]).exit_code == 0
    assert found >= 5


@pytest.mark.parametrize("module", ["generate", "chat", "cache_prompt", "server"])
def test_the_page_names_every_option_of_mlx_lm(module: str) -> None:
    found = importlib.import_module(f"mlx_lm.{module}")
    options = set(re.findall(r'"(--[a-z-]+)"', inspect.getsource(found)))
    page = (Path(__file__).parents[2] / "docs" / "from-mlx-lm.md").read_text(encoding="utf-8")
    table = page.partition(f"| option of `mlx_lm.{module}` |")[2].partition("\n\n")[0]
    assert len(options) > 9 and options - set(re.findall(r"`(--[a-z-]+)`", table)) == set()


@pytest.mark.parametrize("by", ["mlx-lm", "mtp-mlx"])
def test_prompt_caches_are_read_by_both(by: str, folder: Path, tmp_path: Path) -> None:
    text, file = "the sky was grey and", tmp_path / "kept.safetensors"
    if by == "mlx-lm":
        model, tokenizer = mlx_lm.load(str(folder))
        cache, ids = make_prompt_cache(model), tokenizer.encode("<|user|>" + text, add_special_tokens=False)
        model(mx.array([ids]), cache=cache)
        save_prompt_cache(str(file), cache, {"model": str(folder), "tokenizer_config": "{}"})
    else:
        arguments = ["cache-prompt", "-m", str(folder), "-p", text, "-o", str(file)]
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0 and "tokens ->" in result.stderr
    cache, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert metadata["model"] == str(folder) and metadata["tokenizer_config"] == "{}"
    expected = theirs(folder, " cold;<|assistant|>", prompt_cache=cache)
    before = file.read_bytes()
    assert ours(folder, "-p", " cold", "--prompt-cache-file", str(file)) == expected
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat-template-config", "{"], "--chat-template-config is not JSON"),
        (["--chat-template-config", "[1]"], "must be a JSON object"),
        (["--logit-bias", "five"], "must be a token id, =, and a number"),
        (["--logit-bias", "999999=1"], "999999"),
        (["--extra-eos-token", "<|nobody|>"], "is not a token of this model"),
        (["--extra-eos-token", "99999999"], "is not a token of this model"),
        (["--prompt-cache-file", "missing.safetensors"], "there is no such file"),
        (["--adapter-path", "missing"], "--adapter-path must be a folder that mlx_lm.lora wrote"),
        (["--max-kv-size", "4"], "--max-kv-size must be at least 5"),
        (["--max-kv-size", "9", "--prompt-cache-file", "x"], "--max-kv-size is for new caches"),
        (["--raw", "--prefill-response", "it"], "--prefill-response needs the chat template"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        main, ["generate", "-m", str(folder), "-a", "none", "-p", "the sky", *arguments]
    )
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_a_cache_of_another_model_or_no_cache_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "llama", seed=3, num_hidden_layers=3)
    file = tmp_path / "kept.safetensors"
    assert (
        CliRunner()
        .invoke(main, ["cache-prompt", "-m", str(other), "-p", "a", "--raw", "-o", str(file)])
        .exit_code
        == 0
    )
    for content, message in ((None, "make one for this model"), (b"no tensors", "is not a prompt cache")):
        if content is not None:
            file.write_bytes(content)
        result = CliRunner().invoke(
            main, ["generate", "-m", str(folder), "-a", "none", "-p", "b", "--prompt-cache-file", str(file)]
        )
        assert result.exit_code == 2 and message in result.output
