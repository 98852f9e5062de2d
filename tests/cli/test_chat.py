"""Proves what a person sees of `mtp-mlx chat`, over a pipe and in a terminal: answers, commands, Ctrl-C, history."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import random_adapter
from tests.tiny import never_end, save_tiny, tiny_model

CODE = "import sys; from mtp_mlx.cli import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    save_tiny(root / "model", "llama", seed=3)
    model = tiny_model("llama", seed=3)
    adapter = random_adapter(model)
    save_adapter(root / "adapter", adapter, mask_header(adapter.config, "tiny", base_fingerprint(model)))
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))


def arguments(folder: Path, *more: str) -> list[str]:
    return ["chat", "-m", str(folder / "model"), "-a", str(folder / "adapter"), "-n", "12", *more]


def chat(folder: Path, lines: list[str], *more: str) -> Result:
    return CliRunner().invoke(
        cli.main, arguments(folder, *more), input="".join(f"{line}\n" for line in lines)
    )


def test_answers_are_generate_s(folder: Path) -> None:
    options = [
        "-m",
        str(folder / "model"),
        "-a",
        str(folder / "adapter"),
        "-n",
        "12",
        "--system",
        "Be brief.",
    ]
    alone = CliRunner().invoke(cli.main, ["generate", *options, "-p", "The sky"]).stdout
    result = chat(
        folder, ["The sky", "", "/reset", "The sky"], "--system", "Be brief.", "--layout", "quadratic"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == alone * 2 and "Conversation forgotten." in result.stderr


def test_stats_layout_and_color(folder: Path) -> None:
    result = chat(folder, ["/layout", "/layout plain", "a", "b", "/stats", "/color", "/layout linear", "c"])
    lines = result.stderr.splitlines()
    assert "layout auto" in lines and "layout plain" in lines and "layout linear" in lines
    assert any(line.startswith("12 tok · ") and line.endswith(" prompt tok reused") for line in lines)
    assert any(line.startswith("2 answers, 24 tok, 1.00 tok/step, ") for line in lines)
    assert "colour is on" in lines and any("draft 1" in line for line in lines)
    assert "\x1b[" not in chat(folder, ["a"]).stdout


def test_save(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    result = chat(folder, ["a", f"/save {path}", "b", f"/save {path}"])
    messages = json.loads(path.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and messages[2]["content"] == "b"
    assert "".join(m["content"] + "\n" for m in messages[1::2]) == result.stdout
    kept = path.read_text()
    refused = chat(folder, ["c", f"/save {path}", "/save"])
    assert "already exists" in refused.stderr and "name a file" in refused.stderr and path.read_text() == kept


@pytest.mark.parametrize(
    ("name", "message"),
    [("~nosuchuser/x", "no such home folder"), ("x" * 300, "too long"), ("a\0b", "character 0")],
)
def test_a_name_that_no_file_can_have(folder: Path, tmp_path: Path, name: str, message: str) -> None:
    result = chat(folder, ["a", f"/save {name}", f"/save {tmp_path / 'talk'}"])
    assert result.exit_code == 0 and message in result.stderr.lower(), result.output
    assert json.loads((tmp_path / "talk").read_text())["messages"][0]["content"] == "a"


def test_a_line_that_is_no_text_is_left_out(folder: Path) -> None:
    lines = b"a\n\xff\xfe\nb\n"
    result = CliRunner().invoke(cli.main, arguments(folder), input=lines)
    assert result.exit_code == 0 and "not UTF-8 at byte 0" in result.stderr, result.output
    assert result.stdout == chat(folder, ["a", "b"]).stdout


def test_a_template_without_a_system_message(folder: Path, tmp_path: Path) -> None:
    """Is told to refuse it, in a sentence; the conversation is there to go on."""
    strict = tmp_path / "strict"
    shutil.copytree(folder, strict)
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template = f"{refuses}{{{{ messages[-1]['content'] }}}}"
    (strict / "model" / "chat_template.jinja").write_text(template)
    config = strict / "model" / "tokenizer_config.json"
    values = {**json.loads(config.read_text()), "chat_template": template}
    config.write_text(json.dumps(values))
    assert chat(strict, ["a"]).stdout.strip()
    result = chat(strict, ["a", "/layout", "b"], "--system", "x")
    assert result.exit_code == 0 and result.stderr.count("no system role") == 2, result.output
    assert "layout auto" in result.stderr and result.stdout == ""
    options = ["generate", *arguments(strict)[1:], "-p", "a", "--system", "x"]
    refused = CliRunner().invoke(cli.main, options)
    assert refused.exit_code == 2 and "rejects these messages: no system role" in refused.stderr


def test_options_that_are_no_text(folder: Path) -> None:
    for verb, more in (("chat", ["--system", "\udcff"]), ("generate", ["-p", "a", "--system", "\udcff"])):
        refused = CliRunner().invoke(cli.main, [verb, *arguments(folder)[1:], *more], input="a\n")
        assert refused.exit_code == 2 and "--system is not UTF-8" in refused.stderr, refused.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/layout cubic", "unknown layout 'cubic': choose one of auto, linear, quadratic, tree, plain"),
        ("/sats", "no command /sats: did you mean /stats?"),
        ("/xyz", "choose one of /stats, /color, /layout, /save, /reset, /help, /quit"),
        ("/stats", "there is no answer yet"),
        ("/save x", "the conversation is empty"),
        ("/help", "/layout NAME"),
    ],
)
def test_commands_explain_themselves_and_go_on(folder: Path, line: str, message: str) -> None:
    result = chat(folder, [line, "/quit", "never read"])
    assert result.exit_code == 0 and message in result.stderr and result.stdout == ""


def test_a_layout_that_does_not_go_is_not_taken(folder: Path) -> None:
    result = chat(folder, ["/layout linear", "/layout"], "-a", "none")
    assert "needs an adapter" in result.stderr and "layout auto" in result.stderr


def test_a_slash_in_a_message(folder: Path) -> None:
    assert chat(folder, ["//help"]).stdout == chat(folder, [" /help".replace(" /", "//")]).stdout != ""


def test_first_mistakes(folder: Path) -> None:
    for args, message in (
        (["-m", "nowhere"], "no model 'nowhere'"),
        (["--layout", "linear", "-a", "none"], "needs an adapter"),
        (["--emit", "conf-adapt", "--temp", "1"], "would have no effect"),
        (["--slots", "9"], "drafts per step must be 1 to 4"),
    ):
        result = chat(folder, ["a"], *args)
        assert result.exit_code == 2 and message in result.stderr and result.stdout == "", result.output


def test_lossy_is_said(folder: Path) -> None:
    assert "lossless: false" in chat(folder, ["a", "/stats"], "--emit", "conf-adapt").stderr


# --- a terminal -----------------------------------------------------------------------------------------------


class Terminal:
    """The program in a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self._fd, other = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, *command],
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment,
            start_new_session=True,
            # A job in the background of a shell ignores Ctrl-C, and so would all it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(other)
        self.text = ""

    def until(self, wanted: str, seconds: float = 120) -> str:
        """What was printed up to `wanted`, which is taken out of what comes next."""
        end = time.monotonic() + seconds
        while wanted not in self.text:
            ready = select.select([self._fd], [], [], max(0.0, end - time.monotonic()))[0]
            assert ready, f"{wanted!r} did not come; instead: {self.text!r}"
            try:
                self.text += os.read(self._fd, 4096).decode(errors="replace")
            except OSError as error:  # the other end is closed
                raise AssertionError(f"{wanted!r} did not come; instead: {self.text!r}") from error
        before, self.text = self.text.split(wanted, 1)
        return before

    def interrupt_at_prompt(self, wanted: str) -> None:
        """Ctrl-C until the program says `wanted`: one that comes before the terminal is being read is lost."""
        for _ in range(10):
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.until(wanted, seconds=10)
                return
            except AssertionError:
                continue
        raise AssertionError(f"{wanted!r} did not come; instead: {self.text!r}")

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def close(self) -> int:
        code = self.process.wait(timeout=60)
        os.close(self._fd)
        return code


def test_ctrl_c_stops_the_answer_not_the_program(folder: Path, tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(folder, endless)
    never_end(endless / "model")
    terminal = Terminal([*arguments(endless), "-n", "100000", "--layout", "plain"])
    try:
        terminal.until("/quit to leave")
        terminal.until("> ")
        terminal.type("In the beginning\n")
        terminal.until("In the beginning")
        for _ in range(8):  # the answer has begun
            terminal.until(" ")
        os.killpg(terminal.process.pid, signal.SIGINT)
        terminal.until("Stopped.")
        terminal.until("> ")
        terminal.interrupt_at_prompt("To leave, type /quit or press Ctrl-D.")
        terminal.type("/stats\n")
        assert "stopped" in terminal.until("1 answers, ")
        terminal.type("/quit\n")
        assert terminal.close() == 0
    finally:
        terminal.process.kill()
    history = tmp_path / "cache" / "chat_history"
    assert "In the beginning" in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_the_end_of_input_leaves(folder: Path) -> None:
    terminal = Terminal(arguments(folder))
    try:
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.close() == 0
    finally:
        terminal.process.kill()
