"""The page of `serve` in a real browser: tinted tokens, numbers, a race, stopping, a key, a restarted server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mtp_mlx.api import chat_prompt
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.serve.app import AppSettings
from mtp_mlx.serve.engine import EngineSettings
from mtp_mlx.serve.prompts import Limits
from mtp_mlx.serve.sequence import DecodeSettings
from tests.decode.fakes import KnowingDrafter, drafting
from tests.serve.browser import CHROMIUM, Page, browsing
from tests.serve.running import load_model, save_model, serving

DRAFTED = EngineSettings(decode=DecodeSettings(layout="quadratic", drafts=2))
QUESTION = "the fox and the dog"
FREE = "!document.getElementById('send').disabled"
NUMBERS = "[...document.querySelectorAll('.numbers')].map(box => box.textContent)"
TEXTS = "[...document.querySelectorAll('.turn.model .text')].map(box => box.textContent)"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: chromium)")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@contextmanager
def drafted(root: Path, text: str) -> Iterator[None]:
    """Meanwhile most drafts of the answer to `text` are right."""
    model, tokenizer = load_model(root)
    ids = chat_prompt(tokenizer, text)
    truth = [item.token for item in mtp_generate_step(ids, model, max_tokens=80)]
    with drafting(KnowingDrafter(truth, len(ids), 0.8, seed=1)):
        yield


def say(page: Page, text: str) -> None:
    page.type(text)
    page.press("Enter", 13)


def test_an_answer_is_tinted_and_counted(page: Page, root: Path) -> None:
    limits = Limits(default_output=60)
    with drafted(root, QUESTION), serving(root, engine=DRAFTED, limits=limits) as server:
        page.open(server.url + "/")
        page.wait("document.getElementById('model').textContent === 'tiny'")
        say(page, QUESTION)  # by keyboard alone: the field has the focus
        page.wait(f"document.querySelectorAll('.turn').length === 2 && {FREE}")
        (text,) = page.js(TEXTS)
        status, answer = server.ask(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60},
        )
        assert status == 200 and text == answer["choices"][0]["message"]["content"]
        depths = page.js("[...document.querySelectorAll('[data-depth]')].map(span => span.dataset.depth)")
        assert len(depths) > 3 and set(depths) <= {"1", "2"}
        assert sum(answer["mtp"]["drafted_by"].values()) >= len(depths)
        tints = (
            "[...document.querySelectorAll('[data-depth]')].map(box => getComputedStyle(box).backgroundColor)"
        )
        assert len(set(zip(page.js(tints), depths, strict=True))) == len(set(depths)) == 2
        assert page.js("document.querySelector('[data-depth]').title.includes(', draft 1')")
        (shown,) = [line for line in page.js(NUMBERS) if line]
        assert "60 tokens" in shown and "tokens a step" in shown and "accepted " in shown


def test_a_race_shows_the_same_text_twice(page: Page, root: Path, tmp_path: Path) -> None:
    limits = Limits(default_output=40)
    with drafted(root, QUESTION), serving(root, engine=DRAFTED, limits=limits) as server:
        page.open(server.url + "/")
        page.js("document.getElementById('race').click(), document.getElementById('prompt').focus()")
        say(page, QUESTION)
        page.wait(f"document.querySelectorAll('.race .turn').length === 2 && {FREE}")
        texts = page.js(TEXTS)
        assert len(texts) == 2 and texts[0] == texts[1] != ""
        first, second = [line for line in page.js(NUMBERS) if line]
        assert "the same text" in second and "1.00 tokens a step" in second and "1.00 tokens" not in first
        assert page.js("document.querySelectorAll('.race .turn:last-child [data-depth]').length") == 0
        page.screenshot(tmp_path / "race.png")
        assert (tmp_path / "race.png").stat().st_size > 10_000


def test_an_answer_is_stopped_and_the_conversation_goes_on(page: Page, root: Path) -> None:
    limits = Limits(default_output=3000, output=4000)
    with serving(root, engine=DRAFTED, limits=limits) as server:
        page.open(server.url + "/")
        say(page, "abab")
        page.wait("document.querySelector('.turn.model .text').textContent.length > 5")
        page.press("Escape", 27)
        page.wait(FREE)
        server.settle()
        assert page.js("document.getElementById('problem').hidden")
        assert len(page.js(TEXTS)[0]) > 5


def test_waiting_outlasts_what_is_not_there_yet(page: Page) -> None:
    page.open("about:blank")
    page.js("setTimeout(() => document.body.innerHTML = '<p id=late>here</p>', 300)")
    assert page.wait("document.getElementById('late').textContent") == "here"
    with pytest.raises(AssertionError, match="TypeError"):
        page.wait("document.getElementById('never').textContent", seconds=0.2)


def test_it_survives_a_restart_of_the_server(page: Page, root: Path) -> None:
    with serving(root, engine=DRAFTED) as server:
        page.open(server.url + "/")
        port = server.port
    say(page, "abab")
    page.wait("document.getElementById('problem').textContent.includes('cannot be reached')")
    with serving(root, engine=DRAFTED, port=port):
        say(page, "cdcd")
        page.wait(f"{FREE} && document.getElementById('problem').hidden && {TEXTS}.at(-1).length > 3")


def test_a_key_is_asked_for(page: Page, root: Path) -> None:
    with serving(root, engine=DRAFTED, app=AppSettings(api_key="secret")) as server:
        page.open(server.url + "/")
        assert page.js("getComputedStyle(document.getElementById('keyed')).display") == "none"
        say(page, "abab")
        page.wait("document.getElementById('problem').textContent.includes('API key')")
        assert not page.js("document.getElementById('keyed').hidden")
        page.js("document.getElementById('apikey').focus()")
        page.type("secret")
        page.js("document.getElementById('prompt').focus()")
        say(page, "abab")
        page.wait(f"{FREE} && {TEXTS}.at(-1).length > 3")


def test_nothing_comes_from_elsewhere(root: Path) -> None:
    with serving(root) as server:
        status, text = server.ask("/")
    assert status == 200 and "http://" not in text and "https://" not in text and "src=" not in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(page: Page, root: Path, scheme: str) -> None:
    """Contrast of text with every tint and the background is at least 4.5, as WCAG 2.2 asks (1.4.3)."""
    with serving(root, engine=DRAFTED) as server:
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.open(server.url + "/")
        colours = page.js(
            "['--ink', '--faint', '--back', '--paper', '--d1', '--d2', '--d3', '--d4'].map(name => "
            "getComputedStyle(document.documentElement).getPropertyValue(name).trim())"
        )
        page.call("Emulation.setEmulatedMedia", features=[])
    ink, faint, back, paper, *tints = map(luminance, colours)
    assert all(contrast(ink, other) >= 4.5 for other in (back, paper, *tints))
    assert all(contrast(faint, other) >= 4.5 for other in (back, paper))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: float, other: float) -> float:
    low, high = sorted((one, other))
    return (high + 0.05) / (low + 0.05)
